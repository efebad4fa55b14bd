"""`secure.run` by the engine: three processes on this machine, reports that hold what was counted."""

import json
import os
import signal

import pytest
import torch
from secure_cases import cases, tiny_resnet

from deepshare.secure import SecureError, processes, run_model
from deepshare.secure.engine import costs
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.lower import lower


def test_run_reports_what_was_counted():
    """Seven images in batches of three; the last batch is filled up."""
    model, told = tiny_resnet(2), []
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    report = run_model(model, images, labels, batch=3, name="tiny", progress=lambda *done: told.append(done))
    protocol = Protocol.compile(lower(model, (1, 8, 8))[0], Settings(batch=3))
    total = costs.total(protocol)
    assert (report.rounds, report.predicted_rounds, report.flights) == (
        total.rounds,
        total.rounds,
        costs.flights(protocol),
    )
    assert (report.server_bytes, report.client_bytes, report.early_bytes) == (
        total.server_sends,
        total.client_sends,
        total.client_sends_early,
    )
    assert report.dealer_bytes == total.dealt_server + total.dealt_client
    assert report.setup_bytes == sum(8 * torch.Size(protocol.program.params[k].shape).numel() for k in secret(protocol))
    assert (report.agreement, report.accuracy_plain, report.accuracy_secure) == (
        1.0,
        pytest.approx(6 / 7),
        pytest.approx(6 / 7),
    )
    assert report.seconds_online > 0
    assert report.seconds_preparing > 0
    assert told[-1] == (7, 7)
    assert json.loads(report.to_json())["provider_note"].startswith("a process of its own")
    assert "gates by dcf, 64 bits; weights secret, provider dealer" in str(report)


def secret(protocol: Protocol) -> list[str]:
    return list(protocol.masked_params())


def test_public_weights_and_the_tree():
    case = cases()["follower"]
    labels = torch.zeros(len(case.images), dtype=torch.long)
    program, _ = lower(case.model, (4, 3, 4))
    report = run_model(nn_classes(case.model), case.images, labels, weights="public", gate="tree", gate_bits=32)
    assert report.weights == "public"
    assert report.drelus == program.total_drelus
    assert report.engine == "deepshare, gates by tree, 32 bits"
    assert report.agreement == 1.0


def nn_classes(model: torch.nn.Module) -> torch.nn.Module:
    """With classes at its end."""
    torch.manual_seed(0)
    return torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()


@pytest.mark.parametrize("rank", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))])
def test_a_process_that_is_killed_ends_the_run(rank, monkeypatch, tmp_path):
    """The real ones, at work: who lost its peer says so and is not blamed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    check, struck = processes._check_alive, []

    def strike_then_check(watched: list[processes.Process], stall_seconds: float) -> None:
        if not struck and all(process.done > 10 for process in watched):
            struck.extend(watched)
            os.kill(watched[rank].process.pid, signal.SIGKILL)
        check(watched, stall_seconds)

    monkeypatch.setattr(processes, "_check_alive", strike_then_check)
    name = (r"party 0 \(server\)", r"party 1 \(client\)", "the dealer")[rank]
    many = 100_000
    with pytest.raises(SecureError, match=f"{name} was killed by SIGKILL"):
        run_model(tiny_resnet(2), torch.zeros(many, 1, 8, 8), torch.zeros(many, dtype=torch.long))
    assert all(process.process.poll() is not None for process in struck)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"engine": "spu"}, "engine must be 'deepshare' or 'crypten' .got 'spu'."),
        ({"weights": "hidden"}, "weights must be one of"),
        ({"gate": "yao"}, "gate must be one of"),
        ({"batch": 3}, "batch must be in 1..2"),
        ({"images": torch.zeros(2, 8, 8)}, "images must be a float tensor"),
        ({"labels": torch.zeros(2)}, "labels must be integers"),
    ],
)
def test_bad_arguments_are_named_before_a_process_starts(changed, words, monkeypatch):
    monkeypatch.setattr("deepshare.secure.session.run_engine", lambda *_, **__: pytest.fail("processes were started"))
    given = {"images": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2, dtype=torch.long), **changed}
    with pytest.raises(SecureError, match=words):
        run_model(tiny_resnet(2), given.pop("images"), given.pop("labels"), **given)


def test_32_bit_gates_are_refused_where_the_range_does_not_allow_them(monkeypatch):
    """Values of 5,000: 8 times that is above 2^15."""
    monkeypatch.setattr("deepshare.secure.session.run_engine", lambda *_, **__: pytest.fail("processes were started"))
    images, labels = torch.full((1, 4, 3, 4), 5000.0), torch.zeros(1, dtype=torch.long)
    with pytest.raises(SecureError, match="gate_bits must be 64: '0' compares values up to 5000"):
        run_model(torch.nn.Sequential(torch.nn.ReLU()), images, labels, gate_bits=32)
