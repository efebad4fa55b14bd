"""Reads compiled kernels (cubins): registers, stack, spills, and the 16-byte accesses in their machine code."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)")
_SPILL = re.compile(r"\b(?:LDL|STL)(?:\.|\s)")
_WIDE_LOAD = re.compile(r"\bLDG\.E(?:\.\w+)*\.128\b")
_WIDE_STORE = re.compile(r"\bSTG\.E(?:\.\w+)*\.128\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin."""

    symbol: str
    registers: int
    stack: int  # bytes
    spills: int  # accesses to local memory
    wide_loads: int  # 16-byte global loads
    wide_stores: int
    late_loads: int  # 16-byte global loads behind the first 16-byte store


@cache
def tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: the one in Triton's wheel, else the toolkit's; None without either."""
    try:
        import triton
    except ImportError:
        return shutil.which(name)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.is_file() else shutil.which(name)


def _run(name: str, *arguments: str) -> str:
    path = tool(name)
    if path is None:
        raise FileNotFoundError(f"{name}: neither a CUDA toolkit nor Triton's wheel has it")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def demangle(symbols: list[str]) -> list[str]:
    """C++ names without arguments, e.g. `forward_channels_first<float, 4, false>`; unchanged without a demangler."""
    path = shutil.which("c++filt")
    if path is None:
        return symbols
    names = subprocess.run([path], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [_short(name) for name in names.splitlines()]


def _short(name: str) -> str:
    """The function and its template arguments, of a demangled signature."""
    name = re.sub(r"\(anonymous namespace\)|\([\w:]+\)(?=\d)|<unnamed>::", "", name).removeprefix("void ")
    name = re.sub(r"[A-Za-z_]\w*::", "", name).lstrip(":")
    return re.sub(r"\(.*", "", name)


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    """(symbol, machine code) of what `nvdisasm` prints."""
    pieces = re.split(r"^\.text\.(\S+):\s*$", sass, flags=re.MULTILINE)
    yield from zip(pieces[1::2], pieces[2::2], strict=True)


def kernels(cubin: Path) -> list[Kernel]:
    """Every kernel of a cubin; none where the source has only host code."""
    listing = _run("cuobjdump", "-res-usage", str(cubin))
    usage = {symbol: (int(registers), int(stack)) for symbol, registers, stack in _USAGE.findall(listing)}
    code = dict(_functions(_run("nvdisasm", "-c", str(cubin))))
    if set(usage) - set(code):
        raise ValueError(f"{cubin}: usage and machine code name different kernels: {sorted(set(usage) ^ set(code))}")
    return [Kernel(symbol, *usage[symbol], *_accesses(code[symbol])) for symbol in usage]


def _accesses(code: str) -> tuple[int, int, int, int]:
    """(to local memory, 16-byte global loads, 16-byte global stores, such loads behind the first such store)."""
    loads, stores = ([match.start() for match in pattern.finditer(code)] for pattern in (_WIDE_LOAD, _WIDE_STORE))
    late = sum(at > stores[0] for at in loads) if stores else 0
    return len(_SPILL.findall(code)), len(loads), len(stores), late
