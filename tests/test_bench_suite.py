"""bench/ itself: what is compared computes the same, calls are timed in turns, records fit report and comparison."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepshare.analysis.bench_records import read_run

ROOT = Path(__file__).resolve().parents[1]
# What computes another function than ours; all else in a form must give the same values and gradients.
OTHER_FUNCTIONS = {("plain", "relu"), ("residual", "relu"), ("residual", "compile"), ("masked", "relu")}
OTHER_FUNCTIONS |= {("emit", "relu"), ("follower", "relu"), ("soft", "gelu")}
FORMS = ("plain", "residual", "emit", "follower", "masked", "soft", "share")


@pytest.fixture
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def small_case(form: str, layout: str):
    from shapes import Case, Shape

    return Case(Shape(2, 8, 4, 2), torch.int64 if form == "share" else torch.float32, layout)


@pytest.mark.usefixtures("bench_modules")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_compared_computes_the_same(form: str, layout: str):
    from calls import Calls
    from providers import FORMS as MADE

    assert tuple(MADE) == FORMS
    for direction in MADE[form].directions:
        calls = Calls(form, "both" if direction == "backward" else direction, small_case(form, layout))
        expected = results(calls.call("ours", "reference")())
        for name in calls.form.theirs:
            if (form, name) not in OTHER_FUNCTIONS and name != "compile":  # compiling is torch's own to test
                torch.testing.assert_close(results(calls.call(name, "reference")()), expected)


def results(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else found


@pytest.mark.usefixtures("bench_modules")
def test_bytes_are_those_of_the_tensors_passed():
    from shapes import bytes_moved

    case = small_case("plain", "nchw")
    assert (case.x_bytes, case.gate_bytes, case.mask_bytes) == (2 * 8 * 16 * 4, 2 * 2 * 16 // 8, 8 * 16 * 4)
    assert bytes_moved("plain", "forward", case) == 2 * case.x_bytes
    assert bytes_moved("residual", "backward", case) == 4 * case.x_bytes
    assert bytes_moved("follower", "backward", case) == 3 * case.x_bytes + case.gate_bytes
    assert bytes_moved("masked", "backward", case) == 3 * case.x_bytes + 2 * case.mask_bytes


class Recorder:
    """pytest-benchmark's fixture, as far as `measure` uses it, and a clock that every call moves by a known time."""

    enabled = True

    def __init__(self) -> None:
        self.now, self.order = 0.0, []
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def called() -> None:
            self.order.append(name)
            self.now += seconds

        return called

    def pedantic(self, target, *, setup, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            started = self.clock()
            target()
            self.stats.stats.data.append(self.clock() - started)


def measured(monkeypatch: pytest.MonkeyPatch, taken: list[int] | None = None):
    """`measure` of a call of 3 s beside references of 2 s and 6 s, 5 rounds; `taken` are the cores lost a round."""
    import interleave

    recorder = Recorder()
    counts = iter([sum(taken[: i + 1]) for i in range(len(taken))] if taken else ())
    monkeypatch.setattr(interleave, "_taken_cores", lambda: next(counts, 0))
    references = {"relu": recorder.call("relu", 2.0), "eager": recorder.call("eager", 6.0)}
    limits = interleave.Limits(seconds=0.0, least_rounds=5)
    return recorder, interleave.measure(recorder, recorder.clock, recorder.call("ours", 3.0), references, limits)


@pytest.mark.usefixtures("bench_modules")
def test_calls_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch):
    recorder, found = measured(monkeypatch)
    following = {"relu": "eager", "eager": "ours", "ours": "relu"}
    assert all(following[one] == other for one, other in pairwise(recorder.order))
    assert (found["median"], found["p20"], found["p80"], found["kept"]) == (3.0, 3.0, 3.0, 5)
    assert found["against"]["relu"] == {"median": 2.0, "ratio": 1.5, "p20": 1.5, "p80": 1.5}
    assert found["against"]["eager"]["ratio"] == 0.5


@pytest.mark.usefixtures("bench_modules")
def test_a_disturbed_round_is_left_out_where_enough_remain(monkeypatch: pytest.MonkeyPatch):
    import interleave

    monkeypatch.setattr(interleave.Limits, "rounds", lambda self, seconds: 8)
    # One reading of the counter before each of 2 + 8 rounds and one at the end: what a reading adds was lost
    # in the round before it.
    _, found = measured(monkeypatch, [0] * 4 + [1, 0, 1] + [0] * 4)
    assert (found["kept"], found["disturbed"]) == (6, 0.25)
    _, found = measured(monkeypatch, [0] * 4 + [1] * 4 + [0] * 3)
    assert (found["kept"], found["disturbed"]) == (8, 0.5), "4 quiet rounds are fewer than 5: all count"


def bench(*arguments: str) -> str:
    hidden = ("TRITON_INTERPRET", "PYTEST_XDIST")  # a run beside others times nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    selection = ["bench/bench_host.py", "-k", "host_time and plain-forward", "--benchmark-only"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_can_be_reported_and_compared(tmp_path: Path):
    storage = f"--benchmark-storage=file://{tmp_path}"
    limits = ("--benchmark-max-time=0.05", "--benchmark-min-rounds=3")
    bench(storage, *limits, "--benchmark-autosave")
    (record,) = tmp_path.rglob("*.json")
    run = read_run(record)
    assert {row.name for row in run.rows} == {"plain forward"}
    assert {row.provider for row in run.rows} >= {"relu"}
    compared = bench(storage, *limits, "--benchmark-compare", "--benchmark-columns=median")
    assert "(0001" in compared
    assert "machine_info is different" not in compared
