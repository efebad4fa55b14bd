"""Where a phase was trained: what is said of source and machine."""

import subprocess
from pathlib import Path

import torch

from deepshare.train.provenance import Machine, commit_of, this_session


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *named, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_commit_is_named_and_said_to_be_changed(tmp_path):
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "Begin")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{head}-dirty"
    (tmp_path / "inside").mkdir()
    assert commit_of(tmp_path / "inside") is None  # a package installed there is not of that checkout


def test_a_session_names_processor_threads_and_versions():
    session = this_session(torch.device("cpu"), 3)
    assert session.first_epoch == 3
    assert session.versions.torch == torch.__version__
    assert session.machine.threads == torch.get_num_threads()
    assert str(session.machine) == f"{session.machine.cpu}, {session.machine.threads} of {session.machine.cores} cores"
    assert str(Machine("", 8, 1, "H200", 2)) == "2 x H200"
    assert str(Machine("", 8, 1, "H200", 1)) == "H200"
