"""Where a phase was trained: versions, the commit of the source, the machine; one Session for each process."""

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import deepshare

_SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """threads: of torch on the CPU; gpu: its name, where the run was on one; gpus: how many took part"""

    cpu: str
    cores: int
    threads: int
    gpu: str | None = None
    gpus: int = 0

    def __str__(self) -> str:
        if self.gpu is None:
            return f"{self.cpu}, {self.threads} of {self.cores} cores"
        return self.gpu if self.gpus == 1 else f"{self.gpus} x {self.gpu}"


@dataclass(frozen=True)
class Versions:
    """triton: None where it is not installed"""

    deepshare: str
    torch: str
    python: str
    triton: str | None = None


@dataclass(frozen=True)
class Session:
    """One process's part in a phase.

    began: UTC, as 2026-01-31T23:59:59Z; first_epoch: the first one it trained, from 1; commit: of the checkout
    deepshare was imported from, with -dirty where tracked files had changes; None for an installed package
    """

    began: str
    first_epoch: int
    versions: Versions
    machine: Machine
    commit: str | None = None


def this_session(device: torch.device, first_epoch: int) -> Session:
    """The session of this process, from now on."""
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Session(began, first_epoch, versions(), machine(device), commit())


def versions() -> Versions:
    """What this process runs on."""
    return Versions(deepshare.__version__, str(torch.__version__), platform.python_version(), _installed("triton"))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache  # of what this process imported, whatever is checked out later
def commit() -> str | None:
    """The commit of the checkout that deepshare was imported from, see `commit_of`.

    A copy of the source without its history can be named by the variable DEEPSHARE_COMMIT.
    """
    return os.environ.get("DEEPSHARE_COMMIT") or commit_of(_SOURCE)


def commit_of(source: Path) -> str | None:
    """The first 12 digits of the commit of the checkout `source`, and -dirty; None where it is no checkout."""
    if not (source / ".git").exists():  # git would find the checkout that an installed package happens to lie in
        return None
    describe = ["git", "-C", str(source), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a run must not stand in the way of a commit
    try:
        done = subprocess.run(describe, env=environment, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def machine(device: torch.device) -> Machine:
    """This machine, as `device` uses it."""
    cores = len(os.sched_getaffinity(0))
    if device.type != "cuda":
        return Machine(_processor(), cores, torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    return Machine(_processor(), cores, torch.get_num_threads(), name, int(os.environ.get("WORLD_SIZE", 1)))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
