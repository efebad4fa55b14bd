"""`deepshare bench-report`: a real run's record as tables and a picture, and one clear line for anything else."""

import copy
import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepshare import cli
from deepshare.analysis.bench_records import BenchReportError, Interval, Row, read_run
from deepshare.analysis.bench_report import plot, report, seconds
from deepshare.analysis.bench_targets import verdicts

RECORD = Path(__file__).parent / "records" / "bench.json"  # of `make bench BENCH=quick`, some of its rows
MIB = 2**20


def content() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def saved(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def cells(markdown: str, start: str) -> list[list[str]]:
    """The table rows whose first cell begins with `start`."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.splitlines()]
    return [row for row in rows if row[0].startswith(start)]


def test_every_benchmark_becomes_a_row():
    run = read_run(RECORD)
    recorded = content()["benchmarks"]
    assert [row.time.value for row in run.rows] == [entry["extra_info"]["median"] for entry in recorded]
    assert {row.kind for row in run.rows} == {"op", "host", "memory", "module", "model"}
    markdown = report([run])
    for row in run.rows:
        assert any(line[1:3] == [row.case, row.provider] for line in cells(markdown, row.name)), row


def test_a_target_stands_beside_what_was_reached():
    run = read_run(RECORD)
    (row,) = (r for r in run.rows if (r.kind, r.name, r.provider) == ("op", "plain forward", "cpu"))
    ratio = row.ratios["relu"]
    (found,) = cells(report([run]), "CPU, 8 MiB: plain forward / relu")
    assert found[1:4] == [row.case, "cpu", f"<= 1.05 / {ratio.value:.2f}"]
    assert found[4:6] == [f"{ratio.low:.2f}", f"{ratio.high:.2f}"]
    assert found[6] == ("yes" if ratio.value <= 1.05 else "**no**")


def test_machine_and_commit_head_the_report():
    run, recorded = read_run(RECORD), content()
    markdown = report([run, run])
    assert markdown.count(f"## {recorded['machine_info']['cpu']['brand_raw']}, 2 cores, 2 threads") == 2
    assert recorded["commit_info"]["id"][:12] in markdown
    assert f"torch {recorded['machine_info']['torch']}" in markdown
    assert "MALLOC_MMAP_MAX_=0" in markdown


FORWARD = Row(
    kind="op", name="plain forward", provider="cuda", baseline="relu", case="a case", device="cuda", ours=True,
    time=Interval(1e-3, 1e-3, 1e-3), ratios={"clone": Interval(1.0, 0.8, 1.25), "relu": Interval(1.2, 1.0, 1.3)},
    rounds=9, disturbed=0.0, dtype="float32", x_bytes=128 * MIB, bytes_moved=256 * MIB, gb_per_s=100.0,
    share_of_clone=1.0, saved_beyond_inputs=None, gate_bytes=None, peak_bytes=None,
)  # fmt: skip


def row(**changes: Any) -> Row:
    """A row of the plain forward pass at 128 MiB on a GPU, but for the changes."""
    return replace(FORWARD, **changes)


def outcomes(given: Row) -> list[tuple[str, float, float, bool]]:
    return [(v.target.what.split(":")[0], v.bound, v.reached.value, v.met) for v in verdicts([given])]


def test_gpu_targets_go_by_size_and_reach_for_at_least():
    assert outcomes(row()) == [("GPU, from 64 MiB", 0.95, 1.0, True)]
    assert outcomes(row(share_of_clone=0.94)) == [("GPU, from 64 MiB", 0.95, 0.94, False)]
    (verdict,) = verdicts([row(share_of_clone=1.5)])  # 3 passes over a clone's 2: shares are the ratio's reverse
    assert (verdict.reached.low, verdict.reached.high) == (1.5 / 1.25, 1.5 / 0.8)
    assert outcomes(row(x_bytes=32 * MIB)) == [("GPU, CIFAR-size, graph replay", 1.10, 1.2, False)]


def test_cpu_targets_go_by_size_type_and_reference():
    given = row(device="cpu", provider="cpu", x_bytes=8 * MIB)
    assert outcomes(given) == [("CPU, 8 MiB", 1.05, 1.2, False)]
    assert outcomes(replace(given, dtype="bfloat16")) == []
    assert outcomes(replace(given, x_bytes=9 * MIB)) == []
    assert outcomes(replace(given, x_bytes=100 * MIB, ratios={"eager": Interval(0.2, 0.1, 0.3)}))[0][1:] == (
        0.2,
        0.2,
        True,
    )
    assert outcomes(replace(given, ours=False)) == []


def test_a_follower_may_save_its_bits_and_others_nothing():
    memory = row(kind="memory", name="follower forward", saved_beyond_inputs=100, gate_bytes=100)
    assert outcomes(memory)[0][1:] == (100, 100, True)
    assert outcomes(replace(memory, saved_beyond_inputs=101))[0][3] is False
    assert outcomes(replace(memory, name="plain forward"))[0][1:] == (0, 100, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (1.5e-2, "15 ms"), (1.234e-4, "123 us"), (9.96e-7, "996 ns"), (4321.0, "4321 s")],
)
def test_times_have_a_unit(value: float, text: str):
    assert seconds(value) == text


def test_report_and_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "folder"
    assert cli.main(["bench-report", str(RECORD), str(RECORD), "--out", str(out)]) == 0
    assert str(out / "bench-report.md") in capsys.readouterr().out
    pictures = ["bench-report-1.png", "bench-report-2.png"]
    assert sorted(path.name for path in out.iterdir()) == [*pictures, "bench-report.md"]
    for name in pictures:
        head = (out / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:24])[0] == 1320
        assert f"({name})" in (out / "bench-report.md").read_text()


def test_without_a_folder_the_report_is_printed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench-report", str(RECORD)]) == 0
    assert "### Targets" in capsys.readouterr().out


def broken(change: str) -> Any:
    """The record with one thing wrong."""
    value = copy.deepcopy(content())
    entry = value["benchmarks"][1]
    if change == "foreign":
        entry["extra_info"] = {}
    elif change == "no stats of ours":
        del entry["extra_info"]["disturbed"]
    elif change == "text for a number":
        entry["extra_info"]["p20"] = "fast"
    elif change == "not finite":
        entry["extra_info"]["against"] = {"relu": {"ratio": float("nan"), "p20": 1.0, "p80": 1.0}}
    elif change == "no machine":
        del value["machine_info"]
    elif change == "empty":
        value["benchmarks"] = []
    return value


BAD = {
    "another tool": ({"results": [1]}, r"pytest-benchmark.*'benchmarks'"),
    "a list": ([1, 2], r"pytest-benchmark"),
    "no object": ({"benchmarks": [3]}, r"benchmark 0: must be an object \(got int\)"),
    "foreign": (broken("foreign"), r"benchmark 1.*'against' is missing.*bench/"),
    "missing field": (broken("no stats of ours"), r"benchmark 1.*'disturbed' is missing"),
    "wrong type": (broken("text for a number"), r"benchmark 1.*'p20' must be a number \(got 'fast'\)"),
    "not finite": (broken("not finite"), r"benchmark 1.*'ratio' must be a number \(got nan\)"),
    "no machine": (broken("no machine"), r"'machine_info' is missing"),
    "empty": (broken("empty"), r"holds no benchmark"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD.keys())
def test_a_foreign_record_is_one_clear_line_and_writes_nothing(value: Any, message: str, tmp_path: Path, capsys):
    path, out = saved(tmp_path / "record.json", value), tmp_path / "out"
    assert cli.main(["bench-report", str(RECORD), str(path), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"deepshare: .*record\.json.*{message}.*\n", printed.err)
    assert not out.exists()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"median 3 ms"], ids=["empty", "cut", "binary", "text"])
def test_what_is_no_json_is_named(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "record.json"
    path.write_bytes(data)
    assert cli.main(["bench-report", str(path)]) == 2
    assert re.fullmatch(r"deepshare: .*record\.json: is not JSON .*\n", capsys.readouterr().err)


def test_a_missing_file_and_a_blocked_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench-report", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["bench-report", str(RECORD), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bench-report", str(RECORD)], ["demo"]])
def test_without_matplotlib_a_command_that_draws_says_what_to_install(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'deepshare[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_ours_has_nothing_to_plot(tmp_path: Path):
    value = content()
    value["benchmarks"] = [entry for entry in value["benchmarks"] if not entry["extra_info"]["ours"]]
    path = saved(tmp_path / "record.json", value)
    assert "No row of this run has a target." in report([read_run(path)])
    with pytest.raises(BenchReportError, match="nothing to plot"):
        plot(read_run(path))
