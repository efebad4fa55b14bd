"""The whole way with two processes: a checkpoint's report, and parties that die, stop or lose their parent."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from secure_cases import cases, tiny_resnet

from deepshare.checkpoint import load_checkpoint, save_checkpoint
from deepshare.plan import Plan
from deepshare.secure import processes
from deepshare.secure.baseline import costs, run
from deepshare.secure.baseline.jobs import Job
from deepshare.secure.baseline.launcher import LABELS, run_jobs
from deepshare.secure.child import PEER_LOST
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import encode
from deepshare.secure.lower import lower
from deepshare.secure.processes import Process

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("crypten") is None, reason="needs CrypTen (deepshare doctor says how to install it)"
)
STUB = Path(__file__).with_name("stub_party.py")
ENDLESS = 100_000  # images: hours of work
STALL = 12.0  # half of it is the bound on silence


def endless_job() -> Job:
    """Long, and small."""
    program, tensors = lower(torch.nn.Sequential(torch.nn.ReLU()), (4, 3, 4))
    return Job(program, tensors, encode(torch.zeros(ENDLESS, 4, 3, 4)), "public", 1)


@pytest.fixture
def working_folders(tmp_path, monkeypatch) -> Path:
    """Where runs put their working folders, and leave none."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def stub(monkeypatch):
    """Stub processes for parties: stub("work") says what they do."""
    monkeypatch.setattr(processes, "SCRIPT", STUB)
    return lambda behaviour: monkeypatch.setenv("STUB", behaviour)


def small_checkpoint(path: Path) -> tuple[Path, torch.nn.Module, Plan]:
    model = tiny_resnet(2, "resnet6")
    spec = {"name": "resnet6", "num_classes": 10, "width": 4, "stem_relu": True, "in_channels": 1}
    plan = Plan.of(model, (1, 8, 8))
    return save_checkpoint(path, model, {**spec, "input_size": [1, 8, 8]}, plan), model, plan


def test_checkpoint_to_report(tmp_path):
    """Three processes: a server, a client and CrypTen's trusted third party."""
    path, model, plan = small_checkpoint(tmp_path / "net.safetensors")
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    told: list[tuple[int, int]] = []
    settings = {"weights": "secret", "provider": "TTP", "batch": 2}
    report = run(path, images, labels, **settings, progress=lambda *now: told.append(now))

    assert (told[0], told[-1]) == ((0, 2), (2, 2))
    assert sorted(set(told)) == told  # each number once, growing
    assert report.network == str(path)
    assert report.convention == "stem ReLU counted, as in DeepReDuce, DeepReShape, SENet"
    assert (report.weights, report.provider, report.batch, report.images) == ("secret", "TTP", 2, 2)
    assert (report.device, report.transport) == ("CPU, one core a party", "loopback, gloo")
    assert report.drelus == plan.drelus == sum(site.drelus for site in report.sites)
    assert report.rounds == report.predicted_rounds == sum(site.rounds for site in report.sites)
    assert report.server_bytes + report.client_bytes == report.predicted_bytes
    assert report.server_bytes - report.client_bytes == 8 * 2 * 10  # the logits' opening goes one way
    assert report.dealer_bytes == costs.dealt(lower(model, (1, 8, 8))[0], 2, secret=True) > 0
    assert report.accuracy_plain == 0.5
    assert report.agreement >= 0.5  # untrained: a prototype near 0 may flip an argmax
    assert report.seconds_online > 0 < report.seconds_dealing
    assert {"layer1.0.relu1", "logits to the client"} <= {site.name for site in report.sites}
    assert "provider TTP (dealer apart" in str(report)
    stand_in = replace(report, provider="TFP")
    assert "TFP (stand-in dealer: party 0 makes the triples and knows them all)" in str(stand_in)
    assert "stand-in dealer" in json.loads(stand_in.to_json())["provider_note"]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rounds"] == report.rounds
    with pytest.raises(SecureError, match=r"images must be \[N, \*\[1, 8, 8\]\]"):
        run(path, torch.zeros(1, 1, 4, 4), labels[:1])


def test_a_loaded_checkpoint_is_taken_and_what_progress_raises_ends_the_run(
    tmp_path, working_folders, stub, monkeypatch
):
    stub("work")
    loaded, many = load_checkpoint(small_checkpoint(tmp_path / "net.safetensors")[0]), 2000
    monkeypatch.setattr("deepshare.checkpoint.load_checkpoint", lambda _: pytest.fail("loaded again"))

    def enough(done: int, total: int) -> None:
        if done >= 2:
            raise EnoughError(done, total)

    with pytest.raises(EnoughError) as raised:
        run(loaded, torch.zeros(many, 1, 8, 8), torch.zeros(many, dtype=torch.long), progress=enough)
    assert 2 <= raised.value.args[0] < raised.value.args[1] == many
    assert not list(working_folders.iterdir())


class EnoughError(Exception):
    pass


def strike(monkeypatch: pytest.MonkeyPatch, rank: int, sent: int, at: int) -> list[Process]:
    """Sends process `rank` a signal once every party began `at` steps; the processes watched, once it has."""
    struck: list[Process] = []
    check = processes._check_alive

    def strike_then_check(parties: list[Process], stall_seconds: float) -> None:
        if not struck and all(party.done > at for party in parties[:2]):
            struck.extend(parties)
            os.kill(parties[rank].process.pid, sent)
        check(parties, stall_seconds)

    monkeypatch.setattr(processes, "_check_alive", strike_then_check)
    return struck


NAMES = (r"party 0 \(server\)", r"party 1 \(client\)", "the dealer")
DIES, STOPS = (
    r"was killed by SIGKILL at '.+'; (last line of )?its stderr",
    r"gave no sign of life for \d\.\d s \(stopped\?\)",
)


@pytest.mark.parametrize(
    ("rank", "sent", "words"),
    [(0, signal.SIGKILL, DIES), (1, signal.SIGKILL, DIES), (2, signal.SIGKILL, DIES), (1, signal.SIGSTOP, STOPS)],
)
def test_a_process_that_dies_or_stops_ends_the_run(rank, sent, words, stub, monkeypatch, working_folders):
    stub("work")
    struck = strike(monkeypatch, rank, sent, at=2)
    with pytest.raises(SecureError, match=f"{NAMES[rank]} {words}"):
        run_jobs([endless_job()], provider="TTP", stall_seconds=2.0)
    assert len(struck) == 3
    assert all(party.process.poll() is not None for party in struck)
    assert not list(working_folders.iterdir())


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            "idle",
            r"no progress for 1 s: party 0 \(server\) at 'step 0', party 1 \(client\) at 'step 0'; its stderr is empty",
        ),
        (
            "fail",
            r"party 0 \(server\) ended with exit code 1 at 'step 0'; last line of its stderr: KeyError: '0\.beta'",
        ),
    ],
)
def test_processes_that_fail_or_wait_for_each_other_end_the_run(behaviour, words, stub, working_folders):
    stub(behaviour)
    with pytest.raises(SecureError, match=words):
        run_jobs([endless_job()], stall_seconds=1.0)
    assert not list(working_folders.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "provider", "sent"),
    [
        (0, "TFP", signal.SIGKILL),
        (1, "TFP", signal.SIGKILL),
        (1, "TTP", signal.SIGKILL),
        (2, "TTP", signal.SIGKILL),
        (1, "TFP", signal.SIGSTOP),
        (2, "TTP", signal.SIGSTOP),
    ],
)
def test_parties_at_work_end_with_the_one_that_dies_or_stops(rank, provider, sent, monkeypatch, working_folders):
    """The real ones: those that lose their peer say so and are not blamed."""
    struck = strike(monkeypatch, rank, sent, at=100)
    with pytest.raises(SecureError, match=f"{NAMES[rank]} {DIES if sent == signal.SIGKILL else STOPS}"):
        run_jobs([endless_job()], provider=provider, stall_seconds=STALL)
    assert all(party.process.poll() is not None for party in struck)
    assert not list(working_folders.iterdir())


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ((-9, PEER_LOST), "party 0 .* was killed by SIGKILL"),
        ((PEER_LOST, -9), "party 1 .* was killed by SIGKILL"),
        ((PEER_LOST, 1), "party 1 .* ended with exit code 1"),
        ((1, PEER_LOST), "party 0 .* ended with exit code 1"),
        ((0, 7), "party 1 .* ended with exit code 7"),
        ((PEER_LOST, PEER_LOST), "party 0 .* ended with exit code 3 at 'conv1'; last line of its stderr: lost party 1"),
    ],
)
def test_the_party_at_fault_is_blamed_not_the_one_that_lost_its_peer(codes, words, tmp_path):
    parties = []
    for rank, code in enumerate(codes):
        stderr = tmp_path / str(rank)
        stderr.write_text(f"noise\nlost party {1 - rank}\n\n")
        process = SimpleNamespace(returncode=code, poll=lambda code=code: code)
        parties.append(Process(LABELS[rank], stderr, process, -1, io.BytesIO(), place="conv1"))
    assert re.search(words, str(processes._obituary(parties)))


@pytest.mark.slow
def test_an_error_in_one_party_is_told_with_its_last_line():
    program, tensors = lower(cases()["leader"].model, (4, 3, 4))
    job = Job(program, tensors, endless_job().images, "public", 1)
    wrong = replace(
        job, tensors={key: value[:1] for key, value in job.tensors.items() if "alpha" in key}, images=job.images[:1]
    )
    with pytest.raises(
        SecureError, match=r"party [01] .* ended with exit code 1 .* of its stderr: .*KeyError: '0\.beta'"
    ):
        run_jobs([wrong])


def test_parties_die_with_their_parent(tmp_path):
    """The parent is killed with SIGKILL while they start, so it can clean up nothing: the parties must, by themselves.

    Images and weights never have a name, so they cannot stay even where the parties are killed as well.
    """
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from deepshare.secure import processes\n"
        "from deepshare.secure.baseline.launcher import run_jobs\n"
        "from test_secure_run import endless_job\n"
        "start = processes._start\n"
        "def told(*arguments):\n"
        "    party = start(*arguments)\n"
        "    print(party.process.pid, flush=True)\n"
        "    return party\n"
        "processes._start = told\n"
        "run_jobs([endless_job()])\n"
    )
    root = str(Path(processes.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()), int(parent.stdout.readline())]
    assert all(_alive(pid) for pid in pids)
    (folder,) = tmp_path.glob("deepshare-secure-*")
    assert {path.name for path in folder.rglob("*")} - {"rendezvous"} == {"0.stderr", "1.stderr"}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)
    assert not folder.exists()


def _alive(pid: int) -> bool:
    """Running, not a zombie that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
