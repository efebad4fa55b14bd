"""Folders that appear whole or not at all, and what was changed in them staying so."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepshare.secure.errors import SecureError


@contextmanager
def appearing(folder: Path, what: str) -> Iterator[Path]:
    """A folder (0700) beside `folder` that takes its place at the end, or vanishes.

    Raises:
        SecureError: `folder` is there and not empty: `what` is never overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SecureError(f"secure: {folder} is not empty: {what} never overwritten")
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    beside.mkdir(mode=0o700)
    try:
        yield beside
        os.replace(beside, folder)  # refused by the system if somebody filled `folder` meanwhile
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """What was renamed or removed in `folder` stays so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
