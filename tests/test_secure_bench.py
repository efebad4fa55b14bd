"""bench/secure_table6 and bench/peers: links, cells that go on after a kill, tables, failures that are reported."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "peers"))


def loaded(name: str, path: Path) -> ModuleType:
    """A script as a module; it may have no suffix."""
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def peers() -> ModuleType:
    return loaded("run_peers", BENCH / "peers" / "run.py")


@pytest.fixture
def table6() -> ModuleType:
    return loaded("secure_table6", BENCH / "secure_table6")


def has_namespaces() -> bool:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        return False
    made = subprocess.run(["ip", "netns", "add", f"dshare-{os.getpid()}-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", f"dshare-{os.getpid()}-probe"], capture_output=True, check=False)
    return made.returncode == 0


needs_namespaces = pytest.mark.skipif(not has_namespaces(), reason="network namespaces need root and iproute2")


def existing() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("dshare-")}


# --- namespaces and links


def test_without_root_it_says_so_and_ends_with_2(
    table6: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["secure_table6", "--quick", "--link", "1gbit", "--out", str(tmp_path)])
    assert table6.main() == 2
    assert "need root (this is user 1000)" in capsys.readouterr().err


def test_without_tc_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    from secure import namespaces

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(namespaces.MissingError, match="need tc, of the package iproute2: apt-get install iproute2"):
        namespaces.require()


@needs_namespaces
@pytest.mark.parametrize("names", [("server", "client"), ("server", "client", "dealer")])
def test_namespaces_reach_each_other_and_are_gone_after_an_error(names: tuple[str, ...]):
    from secure import namespaces

    before = existing()
    with pytest.raises(ZeroDivisionError), namespaces.hosts(names, 1000) as made:  # noqa: PT012
        assert len(existing() - before) == len(names)
        for name, host in made.items():
            for other in set(names) - {name}:
                target = made[other].addresses[name]
                route = subprocess.run([*host.command, "ip", "route", "get", target], capture_output=True, text=True)
                assert f"dev {host.interfaces[other]} src {host.addresses[other]}" in route.stdout
                shown = [*host.command, "tc", "qdisc", "show", "dev", host.interfaces[other]]
                assert "tbf" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        raise ZeroDivisionError
    assert existing() == before


@needs_namespaces
def test_namespaces_of_a_killed_run_are_removed_by_the_next():
    from secure import namespaces

    gone = subprocess.Popen(["true"])
    gone.wait()
    subprocess.run(["ip", "netns", "add", f"dshare-{gone.pid}-server"], check=True)
    mine = f"dshare-{os.getpid()}-kept"
    subprocess.run(["ip", "netns", "add", mine], check=True)
    try:
        assert f"dshare-{gone.pid}-server" in namespaces.remove_stale()
        assert mine in existing()
    finally:
        subprocess.run(["ip", "netns", "del", mine], check=True)


def test_the_delay_line_holds_packets_back_by_rate_and_delay():
    from secure.delay_line import Direction

    (reading, source), (target, writing) = os.pipe(), os.pipe()
    for descriptor in (reading, target):
        os.set_blocking(descriptor, False)
    line = Direction(reading, writing, bytes_per_second=1000.0, delay=0.5)
    os.write(source, b"x" * 10)
    line.take(now=100.0)
    assert line.next_event() == pytest.approx(100.51)  # 10 bytes at 1000 a second, then the delay
    line.deliver(now=100.5)
    with pytest.raises(BlockingIOError):
        os.read(target, 100)
    line.deliver(now=100.52)
    assert os.read(target, 100) == b"x" * 10
    os.write(source, b"y" * 100)
    line.take(now=200.0)
    assert not line.takes(now=200.0)  # the line is busy for 0.1 s: more waits in the kernel
    assert line.takes(now=200.09)
    for descriptor in (reading, source, target, writing):
        os.close(descriptor)


# --- networks, cells, tables


def test_the_networks_are_the_tables_rows_and_their_baselines():
    from secure.networks import networks

    slugs = [network.slug for network in networks()]
    assert slugs[:4] == ["resnet18-32-all", "resnet18-32-50k", "resnet18-32-12.9k", "resnet18-32-6k"]
    assert slugs[4:] == [
        *("wrn-22-8-32-all", "wrn-22-8-32-150k", "wrn-22-8-32-120k"),
        *("resnet18-64-all", "resnet18-64-55k", "resnet18-64-30k"),
    ]
    assert [network.published for network in networks()][:4] == [None, 4.78, 6.76, 7.64]


def test_a_network_is_the_same_on_every_call_and_near_its_budget():
    from secure.networks import networks

    smallest = networks()[3]
    (model, drelus, plan), (again, _, _) = smallest.build(), smallest.build()
    assert drelus == 6000
    assert "layer4.0.relu1 P=143" in plan
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert one.equal(two)
    assert smallest.images(2)[:1].equal(smallest.images(1))


def visit(seconds: list[float], **changed: Any) -> dict[str, Any]:
    made = {"online": seconds, "preparing": 0.25, "dealing": 0.5, "rounds": 4, "flights": 4}
    made |= {"server_bytes": 100, "client_bytes": 90, "early_bytes": 0, "setup_bytes": 0}
    made |= {"offline_bytes": [125_000_000, 0], "drelus": 6000, "provider": "p", "batch": 1, "device": "d"}
    return made | {"worst_error": 1e-4, "logit_range": 2.0, "load_1": 0.5} | changed


def cells(system: str = "crypten", link: str = "loopback") -> list[Any]:
    from secure.cells import Cell
    from secure.links import LINKS
    from secure.networks import networks

    return [Cell(network, system, "secret", LINKS[link]) for network in networks()[:4]]


def test_a_killed_run_goes_on_and_visits_go_in_turns(tmp_path: Path):
    from secure.cells import Store, pending

    made = cells()
    store = Store(tmp_path)
    store.add(made[0], visit([1.0]))
    store.refuse(made[3], "too large")
    order = []
    for cell in pending(Store(tmp_path), made, 2):
        order.append(made.index(cell))
        store.add(cell, visit([2.0]))
    assert order == [1, 2, 0, 1, 2]
    assert store.found(made)[made[0]].seconds == 1.5
    assert store.refused(made[3]) == "too large"
    assert made[3] not in store.found(made)


def test_visits_that_counted_different_bytes_are_refused(tmp_path: Path):
    from secure.cells import Store

    store, cell = Store(tmp_path), cells()[0]
    store.add(cell, visit([1.0]))
    with pytest.raises(RuntimeError, match="different rounds or bytes"):
        store.add(cell, visit([1.0], client_bytes=91))
    assert len(store.visits(cell)) == 1


def test_the_table_has_both_ratios(tmp_path: Path):
    from secure.cells import Store
    from secure.links import LINKS
    from secure.networks import networks
    from secure.table6 import report

    base, ours = cells("crypten", "1gbit"), cells("engine-dcf", "1gbit")
    store = Store(tmp_path)
    for cell, seconds in ((base[0], 6.0), (base[3], 3.0), (ours[0], 1.0), (ours[3], 0.25)):
        store.add(cell, visit([seconds - 0.1, seconds, seconds + 0.2]))
    text = report(store.found([*base, *ours]), {ours[1]: "too large"}, networks()[:4], [LINKS["1gbit"]])
    (row,) = [line for line in text.splitlines() if line.startswith("| ResNet18/CIFAR-100 6K | 7.64")]
    wanted = ["3.000 (2.900)", "2.00", "0.250 (0.150)", "4.00", "24.00"]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == wanted
    (row,) = [line for line in text.splitlines() if line.startswith("| ResNet18/CIFAR-100 12.9K | 6.76")]
    assert set(row.split("|")[3:-1]) == {" - "}
    assert f"- {ours[1].slug}: too large" in text
    last = [line for line in text.splitlines() if "engine, DCF" in line and "secret" in line][-1]
    assert "| 2.000 |" in last  # 0.5 dealing + 125 MB at 1 Gb/s + 0.25 preparing + 0.25 online


def test_the_latency_model_is_fitted_where_there_are_delays(tmp_path: Path):
    from secure.cells import Store
    from secure.latency_report import latency_report
    from secure.links import LINKS

    store, made = Store(tmp_path), []
    for link in LINKS.values():
        for cell in (cells("engine-dcf", link.slug)[0], cells("engine-dcf", link.slug)[3]):
            wire = 8 * 5_000_000 / (link.megabits * 1e6) if link.megabits else 0.0
            store.add(cell, visit([0.1 + 34 * link.delay + wire], flights=34, path_bytes=5_000_000))
            made.append(cell)
    text = latency_report(store.found(made))
    assert "d = 1.00, w = 1.00; scatter 0.0 %" in text
    assert re.search(r"asked for it: off by [+-]0\.0 %, [+-]0\.0 %\.", text)
    assert latency_report(store.found(made[:4])) == ""


def test_the_path_counts_what_goes_at_once_once():
    from secure.chain import path_bytes
    from secure.networks import networks

    from deepshare.secure.engine import costs
    from deepshare.secure.engine.protocol import Protocol, Settings
    from deepshare.secure.lower import lower

    model, _, _ = networks()[3].build()
    program, _ = lower(model, (3, 32, 32))
    public, secret = (Protocol.compile(program, Settings(weights)) for weights in ("public", "secret"))
    assert path_bytes(public) == costs.total(public).one_way  # openings by both at once; the logits by the server
    sent = costs.total(secret)
    assert sent.one_way < path_bytes(secret) < sent.server_sends + sent.client_sends


# --- peers


def test_inputs_begin_with_the_edges():
    import relu_party

    x = relu_party.inputs(1000)
    assert x[:5].tolist() == [0.0, 2.0**-12, -(2.0**-12), 8 - 2.0**-12, -8.0]
    assert relu_party.inputs(3).shape == (3,)
    assert ((x >= -8) & (x < 8)).all()
    assert (x * 2**12 == (x * 2**12).round()).all()


def test_a_long_first_run_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import relu_party

    options = SimpleNamespace(rank=0, folder=tmp_path, repeats=3)
    calls: list[int] = []
    measure: Callable[[], Any] = lambda: relu_party.timed(options, lambda: calls.append(1), lambda: None)  # noqa: E731
    assert (measure()["warm"], len(calls)) == (True, 4)
    monkeypatch.setattr(relu_party, "LONG", -1.0)
    assert (measure()["warm"], len(calls)) == (False, 5)


def test_wrong_results_are_counted(tmp_path: Path):
    import relu_party

    options = SimpleNamespace(rank=1, folder=tmp_path, elements=100)
    right = relu_party.inputs(100).clip(0)
    right[7] += 0.5
    relu_party.finish(options, {}, right, ("numpy",))
    record = json.loads((tmp_path / "party1.json").read_text())
    assert (record["wrong"], record["worst_error"]) == (1, 0.5)


def party(folder: Path, code: str) -> Path:
    script = folder / "party.py"
    script.write_text(code)
    return script


@pytest.mark.parametrize(
    ("code", "bound", "reason"),
    [
        ("raise SystemExit('no such protocol')", 20.0, "party 0 ended with 1: no such protocol"),
        ("import time; time.sleep(60)", 0.3, "no result in 0.3 s"),
    ],
)
def test_a_peer_that_fails_or_hangs_is_reported(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, bound: float, reason: str
):
    peer = peers.Peer("broken", str(party(tmp_path, code)), (), "", 2, "none")
    record = peers.run(peer, 8, SimpleNamespace(repeats=1, bound=bound))
    assert record["failed"] == reason
    assert reason in peers.table([record])


def test_a_peer_that_cannot_be_installed_is_reported(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "VENVS", tmp_path)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    answer = SimpleNamespace(returncode=1, stderr="ERROR: no matching distribution\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *arguments, **options: answer)
    record = peers.run(peers.Peer("absent", "x.py", ("absent",), "", 2, "none"), 8, SimpleNamespace(repeats=1, bound=1))
    assert record["failed"] == "not installed: pip install absent: ERROR: no matching distribution"


@pytest.mark.slow
def test_our_relu_sends_what_its_formula_says(peers: ModuleType):
    record = peers.run(peers.PEERS[0], 4096, SimpleNamespace(repeats=2, bound=60))
    assert record["wrong"] == 0
    assert record["rounds"] == 6
    assert record["counted_bytes"] == 2 * 4096 * 8 + 2 * 42 * 512  # openings, 42 bits of the tree each way
    assert len(record["seconds"]) == 2


@pytest.mark.slow
@needs_namespaces
def test_the_quick_table_is_measured_between_namespaces(tmp_path: Path):
    command = [sys.executable, str(BENCH / "secure_table6"), "--quick", "--images", "1", "--link", "1gbit"]
    command += ["--weights", "secret", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    kept = {path.name: json.loads(path.read_text())["visits"][0] for path in (tmp_path / "cells").iterdir()}
    assert len(kept) == 6
    assert kept["resnet18-32-6k-engine-dcf-secret-1gbit.json"]["rounds"] == 38
    assert all(one["worst_error"] < 0.1 * one["logit_range"] for one in kept.values())
    assert existing() == set()
