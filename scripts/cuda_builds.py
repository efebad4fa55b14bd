"""Compiles kernels/cuda/*.cu with nvcc, one cubin per file and architecture, and says what each kernel must fulfil."""

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import sass
from build_check import Built

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cuda"
FLAGS = ("-std=c++17", "-O3", "-cubin")
# `name<type, V, ...>`: V elements per access, of which V > 1 is the 16-byte path of that type.
_VECTOR = re.compile(r"^\w+<[^,<>]+, (\d+)")
# Kernels with one path from loads to stores; in forward_rows<.., 3> packing reads again what it stores.
_GROUPED = re.compile(r"^(?:forward_rows<.*, [012]>|(?:hard_rows|masked_forward|masked_backward|share)<)")


def nvcc() -> str | None:
    """Path of nvcc: on the PATH, or in the toolkit's usual folder."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def missing() -> str | None:
    """Why the CUDA sources cannot be checked here, or None."""
    if nvcc() is None:
        return "nvcc is neither on the PATH nor in /usr/local/cuda/bin"
    if sass.tool("cuobjdump") is None or sass.tool("nvdisasm") is None:
        return "neither Triton's wheel nor the CUDA toolkit has cuobjdump and nvdisasm"
    return None


def build(architectures: list[int], cache: Path, *, only: str = "", folder: Path = SOURCES) -> list[Built]:
    """Every kernel of every .cu in `folder` with `only` in its name, per architecture; two compilations at a time."""
    jobs = list(product(sorted(path for path in folder.glob("*.cu") if only in path.name), architectures))
    with ThreadPoolExecutor(2) as pool:
        return [built for kernels in pool.map(lambda job: _kernels(*job, cache), jobs) for built in kernels]


def _kernels(source: Path, architecture: int, cache: Path) -> list[Built]:
    found = sass.kernels(_cubin(source, architecture, cache))
    names = sass.demangle([kernel.symbol for kernel in found])
    return [
        Built("cuda", *_split(name), architecture, kernel, _is_wide(name), bool(_GROUPED.match(name)))
        for name, kernel in zip(names, found, strict=True)
    ]


def _cubin(source: Path, architecture: int, cache: Path) -> Path:
    """The compiled file, from the cache where source, headers, compiler and flags are the same."""
    headers = sorted([*source.parent.glob("*.cuh"), *source.parent.glob("*.h")])
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(
        "\0".join([version, *FLAGS, *(p.read_text() for p in [source, *headers])]).encode()
    ).hexdigest()
    cubin = cache / f"{source.stem}-sm_{architecture}-{key[:16]}.cubin"
    if not cubin.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(".partial")
        command = [str(nvcc()), *FLAGS, f"-arch=sm_{architecture}", str(source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(cubin)
    return cubin


def _split(name: str) -> tuple[str, str]:
    """(`forward_channels_first<4, false>`, `float`) of `forward_channels_first<float, 4, false>`."""
    matched = re.match(r"(\w+)<([^,<>]+)(?:, )?(.*)>$", name)
    if matched is None:
        return name, ""
    kernel, dtype, rest = matched.groups()
    return (f"{kernel}<{rest}>" if rest else kernel), dtype


def _is_wide(name: str) -> bool:
    """Whether this kernel is a 16-byte path, and so must load and store 16 bytes at a time."""
    matched = _VECTOR.match(name)
    return matched is not None and int(matched[1]) > 1
