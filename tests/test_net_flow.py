"""Server, client and dealer together: exact results, one ticket an inference, clear refusals, nothing left behind."""

import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from net_cases import identity, joined, keys
from net_flow import SIZE, Flow
from secure_cases import cases

from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.engine.ticket import read_ticket, ticket_path
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode
from deepshare.secure.label import with_label
from deepshare.secure.lower import lower
from deepshare.secure.net import query, serve
from deepshare.secure.net.ledger import Ledger
from deepshare.secure.net.material import Material
from deepshare.secure.net.query import receive_welcome
from deepshare.secure.replay import replay


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    torch.set_num_threads(1)
    return Flow.make(tmp_path)


def tickets_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.ticket"))


def expected(flow: Flow, deal: Path, numbers: list[int], images: torch.Tensor) -> torch.Tensor:
    """What the two parties must compute with these tickets, from a replay in one process."""
    key = (deal / "server" / "mask.key").read_bytes()
    logits = []
    for number, part in zip(numbers, images.split(flow.protocol.settings.batch), strict=True):
        pair = tuple(read_ticket(ticket_path(deal / name, number)) for name in ("server", "client"))
        logits.append(replay(flow.protocol, flow.tensors, key, pair, part).logits)  # type: ignore[arg-type]
    return decode(torch.cat(logits))


@pytest.mark.parametrize("settings", [Settings(gate="tree"), Settings("public"), Settings(batch=2)], ids=str)
def test_from_disk_the_result_is_exact_and_the_tickets_are_gone(settings: Settings, tmp_path: Path):
    flow = Flow.make(tmp_path, settings)
    deal, images = flow.deal(3), flow.images(2 * settings.batch)
    wanted = expected(flow, deal, [1, 2], images)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=1) as errors:
        answer = flow.query(service, images, material=deal / "client")
    assert errors == service.failures == []
    assert torch.equal(answer.logits, wanted)
    assert tickets_in(deal / "server") == tickets_in(deal / "client") == [3]
    for name, party in (("server", 0), ("client-1", 1)):
        version = Material.open(deal / ("server", "client")[party], party, flow.keys / name).version
        assert Ledger(flow.keys / name).last(version) == 2


def test_a_server_may_reveal_the_label_alone(tmp_path: Path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(cases()["follower"].model, torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    program, tensors = lower(model, SIZE)
    protocol = Protocol.compile(with_label(program), Settings(gate="tree"))
    flow = Flow(tmp_path, keys(tmp_path), protocol, tensors)
    deal, images = flow.deal(2), flow.images(2)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=1) as errors:
        answer = flow.query(service, images, material=deal / "client")
    assert errors == []
    assert answer.logits is None
    with torch.no_grad():
        assert torch.equal(answer.labels, model(decode(images).float()).argmax(1))


def test_a_part_of_a_batch_is_filled_up(tmp_path: Path):
    flow = Flow.make(tmp_path, Settings(gate="tree", batch=2))
    deal, images = flow.deal(2), flow.images(3)
    filled = torch.cat([images, torch.zeros_like(images[:1])])
    wanted = expected(flow, deal, [1, 2], filled)[:3]
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=1):
        answer = flow.query(service, images, material=deal / "client")
    assert torch.equal(answer.logits, wanted)
    assert answer.inferences == 2


def test_from_the_dealer_two_clients_at_once(flow: Flow):
    images = flow.images(3)
    float_logits = cases()["follower"].model(decode(images).float()).flatten(1)
    answers = {}

    def one(name: str) -> None:
        answers[name] = flow.query(service, images, name=name, dealer=dealer.address)

    with flow.dealer() as dealer:
        service = flow.service(dealer=dealer.address)
        with flow.running(service, queries=2) as errors, joined(lambda: one("client-1"), lambda: one("client-2")) as e:
            pass
        assert e == errors == service.failures == []
    for answer in answers.values():
        torch.testing.assert_close(answer.logits.flatten(1).float(), float_logits, atol=2e-3, rtol=0)
    assert sum("ticket" in line and "to the server" in line for line in flow.log) == 6
    assert not any(str(value) in line for line in flow.log for value in images.flatten().tolist() if abs(value) > 9999)


def test_masked_weights_come_once_a_version(flow: Flow):
    deal, images = flow.deal(2), flow.images(1)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        flow.query(service, images, material=deal / "client")
        (cached,) = (flow.folder / "cache").iterdir()
        assert stat.S_IMODE(cached.stat().st_mode) == 0o600
        before = cached.stat().st_mtime_ns
        flow.query(service, images, material=deal / "client")
        assert cached.stat().st_mtime_ns == before


def test_a_damaged_cache_is_replaced(flow: Flow):
    deal, images = flow.deal(2), flow.images(1)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        flow.query(service, images, material=deal / "client")
        (cached,) = (flow.folder / "cache").iterdir()
        whole = cached.read_bytes()
        cached.write_bytes(whole[:-1])
        flow.query(service, images, material=deal / "client")
        assert cached.read_bytes() == whole


# the queue


def wait_until(condition, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_queries_beyond_the_bound_are_refused_and_the_waiting_are_told_their_place(flow: Flow):
    deal = flow.deal(2)
    service = flow.service(material=deal / "server", queue=1)
    heard: list[dict] = []
    with flow.running(service, queries=2):
        first = flow.session(service)
        receive_welcome(first)
        second = flow.session(service, "client-2", on_note=heard.append)
        wait_until(lambda: {"place": 1} in heard)
        with pytest.raises(SecureError, match="refused: busy: a query is served and 1 wait, the most that may"):
            flow.session(service)
        first.close("gave up")
        receive_welcome(second)
        second.close("gave up too")
    assert [why.split(") ")[1] for why in service.failures] == ["ended: gave up", "ended: gave up too"]


def test_who_goes_before_its_turn_is_dropped(flow: Flow):
    deal = flow.deal(1)
    service = flow.service(material=deal / "server", queue=1)
    with flow.running(service, queries=2):
        first = flow.session(service)
        receive_welcome(first)
        flow.session(service).close("impatient")
        wait_until(lambda: any("the client-1" in line for line in flow.log))
        wait_until(lambda: service.waiting() == 0)  # the bound is 1: there is room again
        second = flow.session(service)
        first.close("done")
        receive_welcome(second)
        second.close("done")
    assert any(line.startswith("gone before its turn") for line in flow.log)


def test_a_client_that_asks_for_nothing_is_let_go(flow: Flow, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.3)
    deal = flow.deal(1)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        idle = flow.session(service)
        welcome = receive_welcome(idle)
        query.receive_weights(idle, welcome, flow.folder / "cache")
        with pytest.raises(SecureError, match="sent nothing in time"):
            idle.channel.recv(1)
        idle.close()
        flow.query(service, flow.images(1), material=deal / "client")
    assert len(service.failures) == 1


# who dies


def test_a_client_that_dies_in_an_inference_leaves_the_server_serving(flow: Flow, monkeypatch: pytest.MonkeyPatch):
    deal = flow.deal(2)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        with monkeypatch.context() as patched:
            patched.setattr("deepshare.secure.engine.inference.Inference._compare", fail_at_the_client)
            with pytest.raises(SecureError, match="planted"):
                flow.query(service, flow.images(1), material=deal / "client")
            wait_until(lambda: service.failures)
        flow.query(service, flow.images(1), material=deal / "client")
    assert service.failures[0].endswith("ended: it failed on its own side, its log says why")
    assert tickets_in(deal / "server") == tickets_in(deal / "client") == []


def fail_at_the_client(inference, action):
    if inference.rank == 1:
        raise SecureError("secure: planted")
    inference.link.recv(1)


def test_a_dealer_that_ends_ends_the_server_and_tells_the_waiting(flow: Flow):
    with flow.dealer() as dealer:
        service = flow.service(dealer=dealer.address)
        with flow.running(service, 2) as errors:
            first, second = flow.session(service), flow.session(service, "client-2")
            receive_welcome(first)
            dealer.close("the dealer was stopped")
            first.close("has seen enough")
            with pytest.raises(SecureError, match=r"the dealer \(127.*ended: the dealer was stopped"):
                receive_welcome(second)
            second.close()
    assert str(errors[0]).endswith("ended: the dealer was stopped")


def test_a_ticket_goes_once_and_to_one_certificate(flow: Flow):
    from deepshare.secure.net.session import open_session
    from deepshare.secure.net.supply import FromDealer

    def client(name: str) -> FromDealer:
        session = open_session(dealer.address, identity(flow.keys, name), "dealer")
        return FromDealer(session, flow.protocol, supply.version, 1)

    with flow.dealer() as dealer:
        supply, _ = FromDealer.register(
            open_session(dealer.address, identity(flow.keys, "server"), "dealer"), flow.protocol
        )
        with flow_session(flow) as session:
            supply.begin(session.party)
            assert supply.smallest(1) == 1
        with pytest.raises(SecureError, match="the dealer has no ticket 1 for the client-2"):
            client("client-2").take(1)
        assert client("client-1").take(1).number == supply.take(1).number == 1
        with pytest.raises(SecureError, match="each is given once"):
            client("client-1").take(1)
        supply.version = "ab" * 16
        with pytest.raises(SecureError, match="no version"):
            client("client-1").take(1)
        supply.close()


def flow_session(flow: Flow):
    """A session of client-1 with some server, seen from the server: for its certificate."""
    from contextlib import contextmanager

    from net_cases import Server, session_pair

    @contextmanager
    def made():
        with Server(flow.keys) as server:
            ours, theirs = session_pair(server, flow.keys, "client-1")
            yield theirs
            ours.close()

    return made()


# the guard


GUARD = """
import sys
from deepshare import cli
for command in (["serve", "--model", "absent", "--listen", "127.0.0.1:0"], ["query", "absent.png", "--connect", "h:1"]):
    assert cli.main(["secure", *command, "--keys", "absent"]) == 2
    try:
        import deepshare.secure.dealer.deal
    except ImportError as error:
        print(error)
    del sys.meta_path[0]
import deepshare.secure.dealer.deal
"""


def test_a_partys_process_cannot_import_the_dealer():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True, check=True, cwd=root)
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2
    assert all(line.endswith("a party's process must not import the dealer") for line in refusals)


def test_a_process_that_has_the_dealer_is_no_party():
    from deepshare.secure.net.guard import forbid_dealer

    with pytest.raises(SecureError, match="must not have the dealer"):
        forbid_dealer()
    assert threading.active_count() < 50  # every flow above has ended its threads


def test_who_is_admitted_while_the_server_ends_is_told(flow: Flow):
    deal = flow.deal(1)
    service = flow.service(material=deal / "server")
    with flow.running(service):
        pass
    with pytest.raises(SecureError, match="cannot be reached"):
        flow.session(service)
    from net_cases import Server, session_pair

    with Server(flow.keys) as server:
        ours, theirs = session_pair(server, flow.keys)
        service._waiting.add(theirs)
        with pytest.raises(SecureError, match="ended: it has served what it was to serve"):
            receive_welcome(ours)
        ours.close()
