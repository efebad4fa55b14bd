"""Data sets, their cuts, and augmented batches."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepshare import data
from deepshare.data import augment as augmentation
from deepshare.data import cifar
from deepshare.data.dataset import Split, cut, statistics, stratified


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", seed=3)


def as_set(split: Split) -> set[tuple[bytes, int]]:
    rows = zip(split.images.numpy(), split.labels.tolist(), strict=True)
    return {(image.tobytes(), label) for image, label in rows}


def test_digits_are_the_whole_set_in_three_disjoint_parts(digits):
    from sklearn.datasets import load_digits

    assert (len(digits.train), len(digits.val), len(digits.test)) == (1293, 144, 360)
    assert digits.input_size == (1, 8, 8)
    assert digits.num_classes == 10
    parts = [as_set(split) for split in (digits.train, digits.val, digits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797  # no two images are equal in this set
    raw = load_digits()
    assert int(digits.train.images.max()) == 255
    total = sum(int(split.images.long().sum()) for split in (digits.train, digits.val, digits.test))
    assert total == int((raw.images * 255 / 16).round().sum())


def test_digits_test_split_ignores_the_seed_and_validation_does_not(digits):
    other = data.load("digits", seed=4)
    assert torch.equal(digits.test.images, other.test.images)
    assert not torch.equal(digits.val.images, other.val.images)
    assert torch.equal(digits.val.images, data.load("digits", seed=3).val.images)
    assert digits.mean == other.mean


def test_every_class_keeps_its_share(digits):
    for split in (digits.train, digits.val, digits.test):
        share = split.labels.bincount() / len(split)
        whole = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]) / 1797
        assert (share - whole).abs().max() <= 2 / len(split)


def test_limit_keeps_a_stratified_part_of_train_alone(digits):
    small = data.load("digits", seed=3, limit=100)
    assert small.train.labels.bincount().tolist() == [10] * 10
    assert as_set(small.train) < as_set(digits.train)
    assert torch.equal(small.val.images, digits.val.images)
    assert torch.equal(small.test.images, digits.test.images)


def test_stratified_takes_exactly_the_count_by_largest_remainder():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)  # 7 of 101: exact shares 3.47, 2.08, 1.46
    chosen, rest = stratified(labels, 7, seed=0)
    assert labels[chosen].bincount().tolist() == [4, 2, 1]
    assert torch.equal(torch.cat((chosen, rest)).sort().values, torch.arange(101))


@pytest.mark.parametrize("seed", [-1, 10**26])
def test_seeds_that_torch_cannot_hold_are_refused(seed):
    with pytest.raises(data.DataError, match=f"seed must be between 0 and .* \\(got {seed}\\)"):
        data.load("digits", seed=seed)


@pytest.mark.parametrize(
    ("limit", "val_fraction", "words"), [(0, 0.1, "limit"), (1294, 0.1, "1293"), (None, 1.0, "val_fraction")]
)
def test_impossible_cuts_are_refused(limit, val_fraction, words):
    with pytest.raises(data.DataError, match=words):
        data.load("digits", limit=limit, val_fraction=val_fraction)


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = statistics(images)
    unit = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), unit.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), unit.std((0, 2, 3), correction=0))


def test_evaluation_batches_are_every_image_in_order_normalised(digits):
    batches = digits.batches("test", 100)
    images, labels, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (len(batches), batches.image_count) == (4, 360)
    assert torch.equal(rows, torch.arange(360))
    assert torch.equal(labels, digits.test.labels)
    expected = (digits.test.images.double() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images.double(), expected, atol=1e-6, rtol=1e-6)


def test_training_batches_are_a_shuffle_without_the_short_one(digits):
    batches = digits.batches("train", 128, seed=7)
    assert [len(batch.labels) for batch in batches] == [128] * 10
    assert batches.image_count == 1280
    images, labels, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(rows.unique()) == 1280
    assert torch.equal(labels, digits.train.labels[rows])
    torch.testing.assert_close(images, digits.normalise(digits.train.images[rows]))
    other = torch.cat([batch.rows for batch in digits.batches("train", 128, seed=8)])
    assert not torch.equal(rows, other)


def test_augmented_batches_depend_on_their_seed_alone(digits):
    augment = data.Augment(crop_padding=1)
    torch.manual_seed(1)
    first = [batch.images for batch in digits.batches("train", 64, augment=augment, seed=5)]
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = [batch.images for batch in digits.batches("train", 64, augment=augment, seed=5)]
    assert all(map(torch.equal, first, again))
    assert torch.equal(before, torch.random.get_rng_state())
    plain = [batch.images for batch in digits.batches("train", 64, seed=5)]
    assert not torch.allclose(plain[0], first[0])


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_all_ranks_are_the_batches_of_one(digits, world, seed):
    augment = None if seed is None else data.Augment(crop_padding=1, flip=True)
    whole = list(digits.batches("test", 96, augment=augment, seed=seed))
    ranks = [digits.batches("test", 96, augment=augment, seed=seed, share=(rank, world)) for rank in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for field, of_ranks in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(field, torch.cat(of_ranks))
        assert len({len(part.rows) for part in parts}) == 1 or seed is None


@pytest.mark.parametrize(("share", "words"), [((2, 2), "rank < world"), ((0, 5), "64 images .* by 5 ranks")])
def test_impossible_shares_are_refused(digits, share, words):
    with pytest.raises(data.DataError, match=words):
        digits.batches("train", 64, seed=0, share=share)


def changed(augment: data.Augment, images: torch.Tensor) -> tuple[torch.Tensor, augmentation.Changes]:
    """`images` as one batch, changed, and what was drawn for them."""
    generator = torch.Generator().manual_seed(0)
    (changes,) = augment.draw(1, len(images), generator, torch.device("cpu"))
    return augment(images, changes), changes


def random_images(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_crop_shifts_each_image_by_whole_pixels():
    image = random_images(1)
    shifted, changes = changed(data.Augment(crop_padding=2), image.expand(64, 3, 6, 7))
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2)).float() / 255
    for one, row, column in zip(shifted, *changes.window.tolist(), strict=True):
        assert torch.equal(one, padded[:, row : row + 6, column : column + 7])
    assert len({tuple(window) for window in changes.window.T.tolist()}) > 15  # drawn per image, of 25 shifts
    assert (int(changes.window.min()), int(changes.window.max())) == (0, 4)


def test_flip_is_drawn_per_image():
    image = random_images(1)
    flipped, changes = changed(data.Augment(flip=True), image.expand(64, 3, 6, 7))
    unit = image.float() / 255
    for one, mirrored in zip(flipped, changes.mirrored, strict=True):
        assert torch.equal(one, unit[0].flip(2) if mirrored else unit[0])
    assert 16 < int(changes.mirrored.sum()) < 48


def test_jitter_is_drawn_per_image_and_its_order_per_batch():
    augment = data.Augment(brightness=0.3, contrast=0.2, saturation=0.1, hue=0.05)
    jittered, changes = changed(augment, random_images(1).expand(256, 3, 6, 7))
    assert len(torch.unique(jittered.flatten(1), dim=0)) == 256
    assert float(jittered.min()) >= 0
    assert float(jittered.max()) <= 1
    for factors, middle, strength in zip(changes.factors, (1, 1, 1, 0), (0.3, 0.2, 0.1, 0.05), strict=True):
        low, high = float(factors.min()) - middle, float(factors.max()) - middle
        assert -strength <= low < -0.9 * strength
        assert 0.9 * strength < high <= strength
    drawn = augment.draw(60, 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    orders = {changes.order for changes in drawn}
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}
    assert len(orders) > 15  # of 24


@pytest.mark.parametrize("kind", range(4))
def test_colours_change_as_in_kornia(kind):
    """Each formula beside kornia's, on random colours, on grey, black and white ones."""
    from kornia import enhance

    theirs = (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        lambda unit, turn: enhance.adjust_hue(unit, 2 * torch.pi * turn),
    )[kind]
    unit = random_images(40).float() / 255
    unit[0], unit[1], unit[2] = 0.0, 1.0, unit[2, :1]
    unit[3] = (unit[3] > 0.5).float()  # the corners of the colour cube, where two channels are the largest
    factor = torch.linspace(-0.5, 0.5, 40) + (kind < 3)
    ours = augmentation.CHANGES[kind](unit, factor.view(-1, 1, 1, 1))
    torch.testing.assert_close(ours, theirs(unit, factor), atol=2e-6, rtol=0)
    assert not torch.allclose(ours, unit, atol=0.01)


@pytest.mark.parametrize("wrong", [{"crop_padding": -1}, {"brightness": 1.5}, {"hue": 0.6}])
def test_augment_refuses_impossible_strengths(wrong):
    with pytest.raises(data.DataError, match=next(iter(wrong))):
        data.Augment(**wrong)


def test_jitter_refuses_grey_images():
    with pytest.raises(data.DataError, match="RGB"):
        changed(data.Augment(brightness=0.1), torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(data.DataError, match="digits, cifar10, cifar100"):
        data.load("mnist")


def test_missing_cifar_file_says_what_where_and_from_whom(tmp_path):
    with pytest.raises(data.DataError) as error:
        data.load("cifar10", tmp_path)
    message = str(error.value)
    wanted = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    for part in (str(wanted), "c99cafc152244af753f735de768cd75f", "https://www.cs.toronto.edu/~kriz/cifar.html"):
        assert part in message
    with pytest.raises(data.DataError, match="--data-root"):
        data.load("cifar100")


class Trap:
    """Unpickling this leaves a file: what a hostile pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_unknown_pickles_are_never_opened(tmp_path):
    sprung = tmp_path / "sprung"
    content = pickle.dumps(Trap(sprung))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(content)
    with pytest.raises(data.DataError, match=hashlib.md5(content).hexdigest()):
        data.load("cifar100", tmp_path)
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()  # the trap works


def test_cifar10_layout_is_read_in_order(tmp_path, monkeypatch):
    """Small files in the official form, with their own md5 in place of the published ones."""
    import numpy as np

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    md5 = {}
    pixels = {}
    for number, name in enumerate((*cifar.CIFAR10.train, *cifar.CIFAR10.test)):
        pixels[name] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [(number + row) % 10 for row in range(20)]
        content = pickle.dumps({b"data": pixels[name], b"labels": labels})
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    official = cifar.Official(
        cifar.CIFAR10.folder,
        cifar.CIFAR10.archive,
        {name: md5[name] for name in cifar.CIFAR10.train},
        {name: md5[name] for name in cifar.CIFAR10.test},
        b"labels",
    )
    train, test = cifar.load_cifar_splits(official, folder)  # the folder itself is as good as its parent
    assert (len(train), len(test)) == (100, 20)
    assert train.images[21, 2, 31, 30] == pixels["data_batch_2"][1, 2 * 1024 + 31 * 32 + 30]
    assert train.labels[20:22].tolist() == [1, 2]
    official_train, val = cut(train, 0.2, seed=0, limit=30)
    assert (len(official_train), len(val)) == (30, 20)


@pytest.mark.shared
def test_cifar100_from_the_official_files(shared_dir, tmp_path):
    subprocess.run([sys.executable, shared_dir / "data" / "restore-cifar100", tmp_path], check=True, stdout=-3)
    loaded = data.load("cifar100", tmp_path, val_fraction=0.1, limit=5000)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (5000, 5000, 10000)
    assert loaded.train.labels.bincount().tolist() == [50] * 100
    assert loaded.test.labels.bincount().tolist() == [100] * 100
    # the values everyone uses for CIFAR-100
    torch.testing.assert_close(torch.tensor(loaded.mean), torch.tensor([0.5071, 0.4865, 0.4409]), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(loaded.std), torch.tensor([0.2673, 0.2564, 0.2762]), atol=1e-4, rtol=0)
    coarse = data.load("cifar100-coarse", tmp_path, val_fraction=0.1, limit=5000)
    assert (coarse.num_classes, coarse.test.labels.bincount().tolist()) == (20, [500] * 20)
    assert torch.equal(coarse.test.images, loaded.test.images)
    pairs = set(zip(loaded.test.labels.tolist(), coarse.test.labels.tolist(), strict=True))
    assert len(pairs) == 100  # every class in one superclass
    loaded_path = tmp_path / "cifar-100-python" / "test"
    loaded_path.write_bytes(loaded_path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="not the official file"):
        data.load("cifar100", tmp_path)
