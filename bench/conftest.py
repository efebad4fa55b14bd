"""The record of a run: machine, versions and commit; no figure without them."""

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from interleave import Limits
from measure import Measure

import deepshare
from deepshare.kernels import native

# What decides over page faults and over threads that wait (docs/benchmarks.md).
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: of the selection `make bench BENCH=quick`, two minutes on two cores")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which a GPU machine may lack")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds versions and settings. What names the host goes, records are published; so does the clock's momentary rate,
    which would make every run another machine's."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    for name in ("hz_actual", "hz_actual_friendly"):
        machine_info["cpu"].pop(name, None)
    machine_info["deepshare"] = deepshare.__version__
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = _version("triton")
    machine_info["threads"] = torch.get_num_threads()
    machine_info["settings"] = {name: os.environ.get(name, "default") for name in SETTINGS}
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["cuda"] = torch.version.cuda
    module = native.load()
    machine_info["native"] = native.why_not() if module is None else dict(module.build_info())


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    """Where the sources lie without their history, DEEPSHARE_COMMIT says what they are."""
    commit_info["id"] = os.environ.get("DEEPSHARE_COMMIT") or _commit() or commit_info["id"]


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """Times calls in turns (interleave.py), for --benchmark-max-time seconds and at least --benchmark-min-rounds."""
    option = request.config.getoption
    limits = Limits(float(option("benchmark_max_time")), int(option("benchmark_min_rounds")))
    return Measure(benchmark, request.node.get_closest_marker("benchmark").kwargs["timer"], limits)
