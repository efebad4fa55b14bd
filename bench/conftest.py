"""The record of a benchmark: machine, versions and commit; no figure without them."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import deepshare


def _commit() -> str:
    """HEAD, with `-dirty` where the tree differs from it; "unknown" outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DEEPSHARE_COMMIT", "unknown")
    return done.stdout.strip()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["deepshare"] = deepshare.__version__
    machine_info["commit"] = _commit()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
