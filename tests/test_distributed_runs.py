"""Two processes that train one network: their runs, and their deaths."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_runs import free_port, run_ranks
from torch import Tensor, nn

from deepshare import cli
from deepshare.checkpoint import load_checkpoint
from deepshare.train import (
    Recipe,
    TrainResult,
    load_recipe,
    train,
)
from deepshare.train.loop import evaluate
from deepshare.train.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = ["model.width=2", "model.blocks=[1,1,1,1]", "data.limit=64", "phase.*.epochs=1", "phase.*.batch_size=32"]
SMALL = [*NARROW, "plan.budget=100", "phase.switch.epochs=2"]
SNL = [*NARROW, "plan.budget=100", "phase.masks.epochs=2", "phase.masks.lr=0.3", "snl.lasso=0.1"]


def small(name: str = "demo-240", *more: str) -> Recipe:
    return load_recipe(name, [*(SNL if "snl" in name else SMALL), *more])


def run_of_rank(recipe: Recipe, folder: Path, kill_at: str | None = None) -> dict[str, Any]:
    """A run, of which rank 1 kills itself in the first step of an epoch if `kill_at` names it, as "switch 2"."""
    start = Progress.start_epoch

    def start_epoch(self: Progress, kind: str, epoch: int, *arguments: int) -> None:
        if f"{kind} {epoch}" == kill_at and os.environ["RANK"] == "1":
            self.after_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        start(self, kind, epoch, *arguments)

    with mock.patch.object(Progress, "start_epoch", start_epoch):
        result = train(recipe, folder, resume=True, device="cpu", checkpoint_seconds=0)
    return {"test": result.test_accuracy, "rows": rows_of(result)}


def rows_of(result: TrainResult) -> list[dict[str, Any]]:
    """Without the speeds, which no two runs have in common."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in result.rows]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "final.safetensors").model.state_dict()


def assert_same_course(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal in every number but the loss, which is a mean of sums in another order.

    Seen: 1e-6 of it at most after 20 steps. It grows with the steps until some gate decides otherwise.
    """
    assert [{**row, "loss": None} for row in ours] == [{**row, "loss": None} for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict[str, Any]]:
    """The rows of the run by one process."""
    return rows_of(train(small(), tmp_path_factory.mktemp("runs") / "alone", device="cpu"))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[list[Any], Path]:
    """What two ranks return of the same run, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    return [
        ended.value or pytest.fail(str(ended.error)) for ended in run_ranks(2, run_of_rank, small(), folder)
    ], folder


def test_two_ranks_train_what_one_process_trains(alone, together):
    (first, second), folder = together
    assert first == second
    assert_same_course(first["rows"], alone)
    assert [row["phase"] for row in alone] == ["teacher", "gelu", "switch", "switch", "finetune"]
    log = (folder / "log.txt").read_text()
    assert "; cpu, 2 processes\n" in log
    assert log.count("\n") == 2 + 5  # said once
    assert {type(module) for module in load_checkpoint(folder / "final.safetensors").model.modules()} >= {
        nn.BatchNorm2d
    }


def test_a_rank_that_dies_ends_the_run_and_any_number_goes_on(alone, together, tmp_path):
    survivor, dead = run_ranks(2, run_of_rank, small(), tmp_path / "two", "switch 2")
    assert dead.exitcode == -signal.SIGKILL
    assert "TrainingError: rank 1 is gone (seen by rank 0 of 2); the run can be resumed" in survivor.error
    assert not (tmp_path / "two" / "switch.safetensors").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    by_one = train(small(), tmp_path / "one", device="cpu", resume=True)
    assert by_one.trained == 2
    assert_same_course(rows_of(by_one), alone)
    (first, second), folder = together
    by_two = run_ranks(2, run_of_rank, small(), tmp_path / "two")
    assert [ended.value for ended in by_two] == [first, second]
    ours, theirs = weights(tmp_path / "two"), weights(folder)
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_both_ranks_count_the_same_masks(tmp_path):
    recipe = small("demo-snl-960")
    first, second = run_ranks(2, run_of_rank, recipe, tmp_path / "two")
    assert first.value == second.value != None  # noqa: E711
    course = rows_of(train(recipe, tmp_path / "one", device="cpu"))
    assert [row["drelus"] for row in course if row["phase"] == "masks"] == [480, 15]
    assert_same_course(first.value["rows"], course)
    assert load_checkpoint(tmp_path / "two" / "final.safetensors").plan.drelus == 100


@pytest.mark.slow
def test_norms_that_are_not_synced_train_another_network(alone, tmp_path):
    apart = small("demo-240", "compute.sync_batch_norm=false")
    first, second = run_ranks(2, run_of_rank, apart, tmp_path / "two")
    assert first.value == second.value != None  # noqa: E711
    assert first.value["rows"][0]["loss"] != pytest.approx(alone[0]["loss"], rel=1e-3)
    # what rank 0 wrote is what both measured
    final = load_checkpoint(tmp_path / "two" / "final.safetensors")
    assert evaluate(final.model, small().data.load(None).batches("test", 64)) == first.value["test"]


# --- the command line ------------------------------------------------------------------------------------------------


def commands_of_rank(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """(status, standard output, standard error) of each."""
    found = []
    for command in commands:
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = cli.main(command)
        found.append((status, out.getvalue(), error.getvalue()))
    return found


def test_what_is_refused_ends_every_rank_and_is_said_once(together, tmp_path):
    run = ["--device", "cpu", *(word for change in SMALL for word in ("--set", change))]
    new = ["train", "demo-240", "--out", str(tmp_path / "new"), *run]
    refused = {
        "unknown key": [*new, "--set", "phase.gelu.speed=1"],
        "phase.teacher.batch_size: wanted a multiple of the 2 processes that share it, got 33": [
            *new, "--set", "phase.*.batch_size=33",
        ],
        "got 63, all training images there are": [*new, "--set", "data.limit=63", "--set", "phase.*.batch_size=64"],
        "cifar-100-python": ["train", "deepshare-table1-6k", "--device", "cpu", "--out", str(tmp_path / "new")],
        "there is a run already; resume": ["train", "demo-240", "--out", str(together[1]), *run],
    }  # fmt: skip
    paused = [*new, "--max-minutes", "1e-9"]
    first, second = (
        of.value or pytest.fail(str(of.error)) for of in run_ranks(2, commands_of_rank, [*refused.values(), paused])
    )
    for words, (status, out, error), other in zip(refused, first, second, strict=False):
        assert (status, out) == (2, "")
        assert words in error
        assert other == (2, "", "")
    status, out, error = first[-1]
    assert status == second[-1][0] == os.EX_TEMPFAIL
    assert "paused in gelu after epoch 0 of 1" in error + out
    assert second[-1][1:] == ("", "")


def torchrun(out: Path, *more: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "deepshare", "train", "demo-relu", "--device", "cpu", "--out", str(out)]
    command += [word for change in NARROW for word in ("--set", change)] + list(more)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_trains_and_ends_with_a_worker_that_is_killed(tmp_path):
    whole = torchrun(tmp_path / "run")
    out, error = whole.communicate()
    assert whole.returncode == 0, error[-2000:]
    assert out.count("test accuracy") == 1
    longer = ("--set", "phase.baseline.epochs=500", "--set", "data.limit=128")
    killed = torchrun(tmp_path / "killed", *longer)
    log = tmp_path / "killed" / "log.txt"
    while not (log.is_file() and "baseline   3/500" in log.read_text()):
        assert killed.poll() is None, "the run ended before it was killed"
        time.sleep(0.1)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, error = killed.communicate(timeout=60)
    assert killed.returncode != 0
    assert "SIGKILL" in error
    again = torchrun(tmp_path / "killed", *longer, "--resume", "--max-minutes", "1e-9")
    out, error = again.communicate()
    assert "teacher  1/1" not in out  # that phase had ended
    assert out.count("baseline") == 2  # in what is announced, and one epoch
    assert error.count("deepshare: paused in baseline after epoch") == 1
