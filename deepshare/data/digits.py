"""Handwritten digits that come with scikit-learn: 1,797 images of 8x8, ten classes, nothing to download."""

from __future__ import annotations

import torch

from deepshare.data.dataset import Split, stratified
from deepshare.data.errors import DataError

TEST_IMAGES = 360
TEST_SEED = 0  # the test split never moves: figures of all recipes are over the same 360 images


def load_digits_splits() -> tuple[Split, Split]:
    """(official, test) of sklearn.datasets.load_digits.

    The set has no official split; a stratified fifth (360 images, fixed) is the test split here.
    Pixels 0..16 become 0..255 (round(v * 255 / 16)).

    Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits come with scikit-learn, which is not installed: pip install scikit-learn") from error
    raw = load_digits()
    images = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    test, rest = stratified(labels, TEST_IMAGES, TEST_SEED)
    whole = Split(images, labels)
    return whole.take(rest), whole.take(test)
