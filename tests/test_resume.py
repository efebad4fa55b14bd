"""Runs that are killed with SIGKILL go on to the very weights of a run that is left alone.

Run as a script, this file is the process that trains: it forks a child for every life of the run, and the child kills
itself at a given event. Events are what a kill can fall between: a training step, and every rename that makes a file or
folder appear, just before and just after it.
"""

import csv
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(900)  # one fixture lives four runs, 45 s on a free core
SMALL = ["model.width=2", "data.limit=64", "phase.*.epochs=2", "phase.*.batch_size=16"]
SNL = [*SMALL, "plan.budget=100", "phase.masks.epochs=9", "phase.masks.lr=0.1", "snl.lasso=0.1"]
PHASES = ("teacher", "gelu", "switch", "finetune")
SNL_PHASES = ("pretrain", "masks", "finetune")


def one_run(run_dir: Path) -> None:
    from deepshare.train import load_recipe, train

    train(load_recipe("demo-240", SMALL), run_dir, resume=True, checkpoint_seconds=0)


def chain(run_dir: Path) -> None:
    """All stages: SNL's masks, the DReLUs they leave by site, DeepShare with these as weights; over one store."""
    from deepshare.checkpoint import load_checkpoint
    from deepshare.train import ArtifactStore, load_recipe, train

    store = ArtifactStore(run_dir / "artifacts")
    options = {"resume": True, "checkpoint_seconds": 0, "artifacts": store}
    counted = train(load_recipe("demo-snl-960", SNL), run_dir / "snl", **options)
    weights = [site.drelus for site in load_checkpoint(store.weights(counted.artifacts["masks"])).plan]
    recipe = load_recipe("demo-240", [*SMALL, "plan.method=weights", f"plan.weights={weights}"])
    train(recipe, run_dir / "shared", **options)


JOBS = {"one_run": one_run, "chain": chain}


def live(job: str, run_dir: Path, kill_at: int | None, events: Path) -> None:
    """Train in this process; die at event number `kill_at`, after writing what the event was to `events`."""
    from deepshare.train.progress import Progress

    count, phase = 0, "begin"

    def event(what: str) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            with events.open("a") as file:
                file.write(f"{phase}: {what}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    start, step, moves = Progress.start_epoch, Progress.after_step, (os.replace, os.rename)

    def start_epoch(self: Progress, kind: str, *arguments: int) -> None:
        nonlocal phase
        phase = kind
        start(self, kind, *arguments)

    def after_step(self: Progress, *arguments: object) -> None:
        event("step")
        step(self, *arguments)

    def between(move, source: object, target: object) -> None:
        event(f"before {target}")
        move(source, target)
        event(f"after {target}")

    Progress.start_epoch, Progress.after_step = start_epoch, after_step
    os.replace, os.rename = (partial(between, move) for move in moves)
    torch.set_num_threads(1)
    JOBS[job](run_dir)
    with events.open("a") as file:
        file.write(f"{count} events\n")


def main(folder: Path, runs: list[tuple[str, list[float]]]) -> None:
    """Per run one life per kill, then one to its end. Forked: all imports, torch's late ones too, are made once."""
    for module in ("deepshare.train", "sklearn.datasets", "torch._dynamo"):
        importlib.import_module(module)
    counts: dict[str, int] = {}
    for number, (job, kills) in enumerate(runs):
        events = folder / f"events{number}.txt"
        for kill in [*kills, None]:
            kill_at = round(kill * counts[job]) if isinstance(kill, float) else kill
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    live(job, folder / f"run{number}", kill_at, events)
                    status = 0
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status not in (0, -signal.SIGKILL):
                sys.exit(f"a life ended with {status}")
        if not kills:
            counts[job] = int(events.read_text().split()[0])


def run(folder: Path, *runs: tuple[str, list[float]]) -> list[tuple[list[str], Path]]:
    """For each run, a job and its kills: what each of its lives died of or how many events it had; its folder.

    A kill is the number of an event, or a share of all events of the same job's run without kills, which comes first.
    """
    folder.mkdir()
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), json.dumps(runs)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [
        ((folder / f"events{number}.txt").read_text().splitlines(), folder / f"run{number}")
        for number in range(len(runs))
    ]


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without the speeds, which no two runs have in common."""
    with (run_dir / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if "second" not in key} for row in csv.DictReader(file)]


def assert_same_run(ours: Path, theirs: Path, phases: tuple[str, ...] = PHASES) -> None:
    from deepshare.checkpoint import load_checkpoint

    for name in (*phases, "final"):
        one, other = (load_checkpoint(folder / f"{name}.safetensors") for folder in (ours, theirs))
        ours_weights, theirs_weights = one.model.state_dict(), other.model.state_dict()
        assert ours_weights.keys() == theirs_weights.keys()
        differ = [key for key, value in ours_weights.items() if not torch.equal(value, theirs_weights[key])]
        assert differ == [], name
        assert one.metrics == other.metrics
        assert one.plan == other.plan
    assert rows(ours) == rows(theirs)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert list((ours / "checkpoints").iterdir()) == []


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """By name: what the lives of a run ended with, and its folder. In one process, as imports take longest."""
    draw = random.Random(0)
    runs: dict[str, tuple[str, list[float]]] = {
        "run": ("one_run", []),
        "killed run": ("one_run", [draw.uniform(1 / 12, 1 / 5) for _ in range(8)]),
        "chain": ("chain", []),
        "killed chain": ("chain", [draw.uniform(1 / 14, 1 / 6) for _ in range(10)]),
    }
    return dict(zip(runs, run(tmp_path_factory.mktemp("lived") / "runs", *runs.values()), strict=True))


def test_a_run_killed_in_every_phase_ends_in_the_same_weights(lived):
    lives, folder = lived["killed run"]
    deaths = [life for life in lives if not life.endswith("events")]
    phases = {death.partition(":")[0] for death in deaths}
    assert phases >= set(PHASES), deaths
    assert {death.split()[1] for death in deaths} == {"step", "before", "after"}, deaths
    assert (folder / "log.txt").read_text().count("resumed after") > 5
    assert_same_run(folder, lived["run"][1])


def artifacts(folder: Path) -> dict[str, dict[str, str]]:
    """The content hashes of every artifact in a chain's store, by key; a kill may leave an unfinished one, hidden."""
    paths = [path for path in folder.glob("artifacts/*/*/artifact.json") if not path.parent.name.startswith(".")]
    found = {path.parent.name: json.loads(path.read_text()) for path in paths}
    assert all(record["key"] == key for key, record in found.items())
    return {key: record["sha256"] for key, record in found.items()}


def assert_same_chain(ours: Path, theirs: Path) -> None:
    assert_same_run(ours / "snl", theirs / "snl", SNL_PHASES)
    assert_same_run(ours / "shared", theirs / "shared")
    assert (ours / "snl" / "plan.json").read_bytes() == (theirs / "snl" / "plan.json").read_bytes()
    assert artifacts(ours) == artifacts(theirs)


def test_a_chain_of_all_stages_killed_ten_times_ends_in_the_same_artifacts(lived):
    (lives, folder), (_, expected) = lived["killed chain"], lived["chain"]
    assert len(artifacts(expected)) == len(SNL_PHASES + PHASES)
    assert len(lives) == 11, lives
    assert {death.partition(":")[0] for death in lives[:-1]} >= {"masks", "gelu", "switch"}, lives
    assert_same_chain(folder, expected)
    counts = [int(row["drelus"]) for row in rows(folder / "snl") if row["phase"] == "masks"]
    assert min(counts) < 960 == counts[0]  # masks were learned, and over several lives


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("part", range(8))
def test_killed_at_any_event_a_run_and_a_chain_end_in_the_same_weights(lived, tmp_path, part):
    """Of the run every event, of the chain every third."""
    for job, name, step, same in (("one_run", "run", 8, assert_same_run), ("chain", "chain", 24, assert_same_chain)):
        (events, expected) = lived[name]
        kills = range(1 + part, int(events[-1].split()[0]) + 1, step)
        for lives, folder in run(tmp_path / job, *((job, [event]) for event in kills)):
            assert lives[0].split()[1] in ("step", "before", "after")
            same(folder, expected)


def train_cifar100(data_root: Path, run_dir: Path, changes: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """`deepshare train`, as a user calls it."""
    settings = [word for change in changes for word in ("--set", change)]
    name = "deepshare-table1-12.9k"
    command = [sys.executable, "-m", "deepshare", "train", name, "--data-root", data_root, "--out", run_dir]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen([*command, "--resume", *settings], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("size", [(8, 1000), (16, 5000)], ids=["small", "issue"])
def test_cifar100_killed_in_the_second_epoch_of_each_phase(shared_dir, tmp_path, size):
    subprocess.run([sys.executable, shared_dir / "data" / "restore-cifar100", tmp_path], check=True, stdout=-3)
    width, limit = size
    changes = (f"model.width={width}", f"data.limit={limit}", "phase.*.epochs=2", "plan.budget=5000")
    changes += ("plan.weights=ResNet18_c100_relu50k",)  # in the place of an SNL run's counts
    assert train_cifar100(tmp_path, tmp_path / "whole", changes).wait() == 0
    for phase in PHASES:
        life = train_cifar100(tmp_path, tmp_path / "killed", changes)
        log = tmp_path / "killed" / "log.txt"
        while not (log.is_file() and f"{phase:<8} 1/2" in log.read_text()):
            assert life.poll() is None, "the run ended before it was killed"
            time.sleep(0.05)
        life.kill()
        assert life.wait() == -signal.SIGKILL
    assert train_cifar100(tmp_path, tmp_path / "killed", changes).wait() == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert_secure_run_agrees(tmp_path / "killed" / "final.safetensors", tmp_path)


def assert_secure_run_agrees(checkpoint: Path, data_root: Path) -> None:
    """Costs are exact; argmaxes may differ where sharing makes rounding matter (README: 195 of 200 seen equal)."""
    from deepshare import data, secure

    cifar = data.load("cifar100", data_root)
    images, labels = cifar.normalise(cifar.test.images[:200]), cifar.test.labels[:200]
    report = secure.run(checkpoint, images, labels, batch=20)
    print(report)  # shown by pytest -s: the figures in the README
    assert report.rounds == report.predicted_rounds > 0
    assert report.server_bytes + report.client_bytes == report.predicted_bytes > 0
    assert report.images == 200
    assert report.agreement >= 0.9


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
