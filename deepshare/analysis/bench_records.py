"""Runs of bench/ as pytest-benchmark wrote them, read and checked. What the fields mean: docs/benchmarks.md."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BenchReportError(ValueError):
    """A file that is no record of bench/."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 20th and 80th percentile."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One benchmark. Times in seconds, sizes in bytes; None where a benchmark has no such figure."""

    kind: str  # op, module, model, step, host, memory
    name: str
    provider: str
    baseline: str
    case: str
    device: str
    ours: bool
    time: Interval
    ratios: Mapping[str, Interval]  # reference -> time / the reference's, timed in turns
    rounds: int  # that the figures are of
    disturbed: float  # share of all rounds in which the system took a core away
    dtype: str | None
    x_bytes: int | None
    bytes_moved: int | None
    gb_per_s: float | None
    share_of_clone: float | None
    saved_beyond_inputs: int | None
    gate_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Run:
    """One file."""

    name: str
    machine: str
    versions: str
    commit: str
    date: str
    rows: tuple[Row, ...]


def read_run(path: Path | str) -> Run:
    """The run that `path` holds: written by `pytest bench --benchmark-json` or kept by --benchmark-save.

    Raises:
        BenchReportError: no JSON, another tool's JSON, or a field is missing or of another type; names it.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise BenchReportError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise BenchReportError(f"{path}: must be written by pytest-benchmark, it has no list 'benchmarks'")
    file = _Fields(content, f"{path}")
    rows = tuple(_row(_Fields(entry, f"{path}, benchmark {i}")) for i, entry in enumerate(content["benchmarks"]))
    if not rows:
        raise BenchReportError(f"{path}: holds no benchmark")
    machine, commit = file.table("machine_info"), file.table("commit_info")
    state = " with changes" if commit.optional("dirty", bool) else ""
    return Run(
        name=str(path),
        machine=_machine(machine),
        versions=_versions(machine),
        commit=commit.get("id", str)[:12] + state,
        date=file.get("datetime", str)[:10],
        rows=rows,
    )


class _Fields:
    """A JSON object whose fields are asked for by type; what is wrong is named with the place."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise BenchReportError(f"{where}: must be an object (got {type(values).__name__})")
        self.values, self.where = values, where

    def get(self, name: str, kind: type) -> Any:
        if name not in self.values:
            raise BenchReportError(f"{self.where}: {name!r} is missing; was it written by deepshare's bench/?")
        return self._checked(name, kind)

    def optional(self, name: str, kind: type) -> Any:
        return None if self.values.get(name) is None else self._checked(name, kind)

    def table(self, name: str) -> "_Fields":
        return _Fields(self.get(name, dict), f"{self.where}, {name}")

    def number(self, name: str) -> float:
        return float(self.get(name, float))

    def _checked(self, name: str, kind: type) -> Any:
        value = self.values[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (is_number if kind is float else isinstance(value, kind)):
            wanted = "a number" if kind is float else kind.__name__
            raise BenchReportError(f"{self.where}: {name!r} must be {wanted} (got {value!r:.60})")
        return value


def _row(entry: _Fields) -> Row:
    extra = entry.table("extra_info")
    against = extra.table("against")
    compared = {name: against.table(name) for name in against.values}
    return Row(
        **{name: extra.get(name, str) for name in ("kind", "name", "provider", "baseline", "case", "device")},
        ours=extra.get("ours", bool),
        time=Interval(extra.number("median"), extra.number("p20"), extra.number("p80")),
        ratios={name: Interval(r.number("ratio"), r.number("p20"), r.number("p80")) for name, r in compared.items()},
        rounds=extra.get("kept", int),
        disturbed=extra.number("disturbed"),
        dtype=extra.optional("dtype", str),
        bytes_moved=extra.optional("bytes", int),
        **{name: extra.optional(name, int) for name in ("x_bytes", "saved_beyond_inputs", "gate_bytes", "peak_bytes")},
        **{name: extra.optional(name, float) for name in ("gb_per_s", "share_of_clone")},
    )


def _machine(info: _Fields) -> str:
    cpu = info.table("cpu")
    threads = info.get("threads", int)
    cores = f"{cpu.optional('count', int) or '?'} cores, {threads} thread{'s' if threads > 1 else ''}"
    gpu = info.optional("gpu", str)
    name = cpu.optional("brand_raw", str) or "unknown CPU"
    return ", ".join([name, cores, *([gpu] if gpu else [])])


def _versions(info: _Fields) -> str:
    names = ("deepshare", "torch", "triton", "cuda")
    found = [f"{name} {info.optional(name, str)}" for name in names if info.optional(name, str)]
    native = info.values.get("native")
    if isinstance(native, dict):
        found.append(f"CPU kernels {native.get('cpu_kernels')}")
    settings = info.table("settings")
    changed = [f"{name}={value}" for name, value in settings.values.items() if value != "default"]
    return ", ".join([f"Python {info.get('python_version', str)}", *found, *changed])
