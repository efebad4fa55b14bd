"""write_whole and link_whole: the new content or the old, never a part."""

import os
from pathlib import Path

import pytest

from deepshare.files import link_whole, write_whole


def test_writes_text_and_bytes(tmp_path: Path):
    assert write_whole(tmp_path / "a", "é").read_bytes() == "é".encode()
    assert write_whole(str(tmp_path / "a"), b"\x00").read_bytes() == b"\x00"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_whole(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_link_is_followed_and_the_umask_kept(tmp_path: Path):
    (tmp_path / "real").mkdir()
    target = write_whole(tmp_path / "real" / "a", "old")
    (tmp_path / "link").symlink_to(target)
    old = os.umask(0o077)
    try:
        write_whole(tmp_path / "link", "new")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_file_is_linked_and_not_the_link_that_leads_to_it(tmp_path: Path):
    (tmp_path / "real").mkdir()
    target = write_whole(tmp_path / "real" / "a", "content")
    (tmp_path / "real" / "link").symlink_to("a")
    linked = link_whole(tmp_path / "real" / "link", tmp_path / "b")
    assert not linked.is_symlink()
    assert linked.samefile(target)
    assert linked.read_text() == "content"


def test_what_is_no_file_is_refused(tmp_path: Path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="must be a file"):
            write_whole(path, "x")
    assert Path("/dev/null").is_char_device()


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(OSError, match="absent"):
        write_whole(tmp_path / "absent" / "a", "x")
