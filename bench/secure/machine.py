"""Which machine a figure was made on, and what else ran there."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, cores, memory, kernel, Python, commit and the load of the last minute and quarter of an hour."""
    one, _, fifteen = os.getloadavg()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
        "load_1": one,
        "load_15": fifteen,
    }


def line() -> str:
    """The same in one line."""
    found = describe()
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB, Linux {found['kernel']}, Python "
        f"{found['python']}, commit {found['commit']}; load {found['load_1']:.1f} in the last minute, "
        f"{found['load_15']:.1f} in the last 15"
    )


def _processor() -> str:
    names = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def commit() -> str:
    """Of this tree; DEEPSHARE_COMMIT where it lies without its history."""
    if named := os.environ.get("DEEPSHARE_COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
