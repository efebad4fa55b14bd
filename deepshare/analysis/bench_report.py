"""Runs of bench/ as Markdown, targets beside what was reached, and as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deepshare.analysis.bench_records import BenchReportError, Row, Run, read_run
from deepshare.analysis.bench_targets import Verdict, verdicts
from deepshare.analysis.drawing import check_can_draw, new_figure, png
from deepshare.files import write_whole

REPORT, PICTURE = "bench-report.md", "bench-report"
_TARGET_HEADER = ("what", "case", "by", "target / reached", "20 %", "80 %", "met")
_ROW_HEADER = ("what", "case", "by", "median", "20 %", "80 %", "GB/s", "of clone", "ratio to baseline", "other ratios")
_MEMORY_HEADER = ("what", "case", "by", "saved beyond inputs", "peak of forward + backward")
_TITLES = {
    "op": "Operators",
    "module": "Modules",
    "model": "Networks, inference",
    "step": "Networks, training step",
    "loop": "Training loops",
    "host": "Host time of a call",
    "gates": "Gate backends",
}


def report(runs: Sequence[Run], pictures: Sequence[str] = ()) -> str:
    """Markdown: per run the machine, the targets beside what was reached, every row; `pictures` are linked."""
    lines = ["# Benchmarks", ""]
    for number, run in enumerate(runs):
        lines += [f"## {run.machine}", "", f"{run.versions}. Commit {run.commit}, {run.date}.", _disturbance(run), ""]
        if pictures:
            lines += [f"![ratios to the baseline]({pictures[number]})", ""]
        lines += ["### Targets", "", *_targets(run), ""]
        for kind, title in _TITLES.items():
            rows = [_cells(row) for row in run.rows if row.kind == kind]
            lines += [f"### {title}", "", *_table(_ROW_HEADER, rows), ""] if rows else []
        memory = [_memory_cells(row) for row in run.rows if row.kind == "memory"]
        lines += ["### Memory", "", *_table(_MEMORY_HEADER, memory), ""] if memory else []
    return "\n".join(lines)


def write(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of these files and a picture per file to the folder `out`, made where it is missing.

    Raises:
        BenchReportError: as `read_run`. DrawingError: matplotlib is missing. OSError: a file cannot be read or written.
    """
    runs = [read_run(path) for path in paths]
    drawn = [plot(run) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{PICTURE}-{number}.png" for number in range(1, len(runs) + 1)]
    for name, picture in zip(names, drawn, strict=True):
        write_whole(out / name, picture)
    return write_whole(out / REPORT, report(runs, names))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [lines[0], "| --- " * len(header) + "|", *lines[1:]]


def _disturbance(run: Run) -> str:
    share = sum(row.disturbed for row in run.rows) / len(run.rows)
    return f"In {100 * share:.0f} % of the rounds another process took a core."


def _targets(run: Run) -> list[str]:
    rows = [_target_cells(verdict) for verdict in verdicts(run.rows)]
    return _table(_TARGET_HEADER, rows) if rows else ["No row of this run has a target."]


def _target_cells(verdict: Verdict) -> tuple[str, ...]:
    row, unit, reached = verdict.row, verdict.target.unit, verdict.reached
    digits = 0 if unit == " B" else 1 if unit else 2
    comparison = "<=" if verdict.target.at_most else ">="
    figures = f"{comparison} {verdict.bound:,.{digits}f}{unit} / {reached.value:,.{digits}f}{unit}"
    spread = (f"{reached.low:,.{digits}f}", f"{reached.high:,.{digits}f}") if unit != " B" else ("", "")
    return verdict.target.what, row.case, row.provider, figures, *spread, "yes" if verdict.met else "**no**"


def _cells(row: Row) -> tuple[str, ...]:
    times = (seconds(value) for value in (row.time.value, row.time.low, row.time.high))
    rate = "" if row.gb_per_s is None else f"{row.gb_per_s:,.1f}"
    share = "" if row.share_of_clone is None else f"{row.share_of_clone:.2f}"
    ratio = row.ratios.get(row.baseline)
    against = "baseline" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) x {row.baseline}"
    others = (f"{value.value:.2f} x {name}" for name, value in row.ratios.items() if name != row.baseline)
    return row.name, row.case, row.provider, *times, rate, share, against, ", ".join(others)


def _memory_cells(row: Row) -> tuple[str, ...]:
    sizes = ("" if size is None else f"{size:,} B" for size in (row.saved_beyond_inputs, row.peak_bytes))
    return row.name, row.case, row.provider, *sizes


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def plot(run: Run) -> bytes:
    """PNG: of every row of ours the ratio to its baseline, with the 20th and 80th percentile, and the targets.

    Raises:
        DrawingError: matplotlib is missing. BenchReportError: no row of ours has a ratio.
    """
    compared = [row for row in run.rows if row.ours and row.baseline in row.ratios]
    rows = [row for kind in _TITLES for row in compared if row.kind == kind]
    if not rows:
        raise BenchReportError(f"{run.name}: no benchmark compares deepshare with its baseline, nothing to plot")
    check_can_draw()
    figure, ((axes,),) = new_figure(11, 1.5 + 0.24 * len(rows))
    _draw(axes, rows, _bounds(run))
    axes.set_title(f"{run.machine}; commit {run.commit}, {run.date}", fontsize=9)
    return png(figure, dpi=120)


def _bounds(run: Run) -> dict[int, float]:
    """id of a row -> the target for its ratio to the baseline."""
    found = verdicts(run.rows)
    return {id(v.row): v.bound for v in found if v.target.at_most and v.reached is v.row.ratios.get(v.row.baseline)}


def _draw(axes: Any, rows: Sequence[Row], bounds: dict[int, float]) -> None:
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.provider for row in rows))}
    for height, row in enumerate(rows):
        ratio = row.ratios[row.baseline]
        axes.plot([ratio.low, ratio.high], [height, height], color=colours[row.provider], linewidth=1.5, alpha=0.6)
        axes.plot(ratio.value, height, "o", color=colours[row.provider], markersize=5)
        if id(row) in bounds:
            axes.plot(bounds[id(row)], height, "k|", markersize=9)
    labels = [f"{row.kind} {row.name}, {row.case}, {row.provider} / {row.baseline}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set(xscale="log", xlabel="time / baseline's time, median and 20-80 % of the rounds; | target")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
