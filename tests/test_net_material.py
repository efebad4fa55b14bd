"""Tickets and deals: used once, whole, of this model and party; what is not is refused and named."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from net_flow import Flow
from secure_cases import cases

from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.engine.ticket import ticket_path
from deepshare.secure.errors import SecureError
from deepshare.secure.lower import lower
from deepshare.secure.net.deal import deal_to_disk
from deepshare.secure.net.material import Material


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    torch.set_num_threads(1)
    return Flow.make(tmp_path)


def tickets_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.ticket"))


def test_both_agree_on_the_smallest_number_that_both_have(flow: Flow):
    deal = flow.deal(5)
    for name, numbers in (("client", (1, 3)), ("server", (2,))):
        for number in numbers:
            ticket_path(deal / name, number).unlink()
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=1):
        flow.query(service, flow.images(1), material=deal / "client")
    assert tickets_in(deal / "server") == tickets_in(deal / "client") == [5]


def test_no_ticket_left_is_said_at_both(flow: Flow):
    deal = flow.deal(1)
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        flow.query(service, flow.images(1), material=deal / "client")
        with pytest.raises(SecureError, match="the server has no unused ticket that both parties have"):
            flow.query(service, flow.images(1), material=deal / "client")
    assert "no unused ticket that the client has too" in service.failures[0]


def test_a_torn_ticket_is_named_and_burnt_and_the_next_one_serves(flow: Flow):
    deal = flow.deal(2)
    torn = ticket_path(deal / "client", 1)
    torn.write_bytes(torn.read_bytes()[:-7])
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        with pytest.raises(SecureError, match=rf"{torn} is torn"):
            flow.query(service, flow.images(1), material=deal / "client")
        assert tickets_in(deal / "client") == [2]
        flow.query(service, flow.images(1), material=deal / "client")
    assert tickets_in(deal / "server") == []
    assert service.failures[0].endswith("ended: it failed on its own side, its log says why")  # and no path of it


def test_a_used_ticket_copied_back_is_not_used_again(flow: Flow, tmp_path: Path):
    deal = flow.deal(2)
    shutil.copytree(deal, tmp_path / "copy")
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=1):
        flow.query(service, flow.images(1), material=deal / "client")
    for name in ("server", "client"):
        shutil.copy(ticket_path(tmp_path / "copy" / name, 1), deal / name)
    material = Material.open(deal / "client", 1, flow.keys / "client-1")
    with pytest.raises(SecureError, match=r"ticket 1 of version \w{8} was used before \(the ledger .* stands at 1\)"):
        material.take(1)
    assert material.smallest(1) == 2
    assert material.remove_used() == [1]
    # the whole folder from a copy, at one party alone: the other's ledger decides
    (flow.keys / "client-1" / "ledger.json").unlink()
    shutil.rmtree(deal / "client")
    shutil.copytree(tmp_path / "copy" / "client", deal / "client")
    service = flow.service(material=deal / "server")
    assert tickets_in(deal / "server") == [2]
    with flow.running(service, queries=1):
        flow.query(service, flow.images(1), material=deal / "client")
    assert tickets_in(deal / "client") == []


def test_a_ticket_renamed_is_refused(flow: Flow):
    deal = flow.deal(2)
    ticket_path(deal / "client", 1).rename(ticket_path(deal / "client", 7))
    material = Material.open(deal / "client", 1, flow.keys / "client-1")
    with pytest.raises(SecureError, match=r"must be number 7 of version .*got number 1"):
        material.take(7)


def test_a_damaged_ledger_is_refused(flow: Flow):
    deal = flow.deal(1)
    (flow.keys / "server" / "ledger.json").write_text("{")
    with pytest.raises(SecureError, match=r"ledger\.json is damaged"):
        flow.service(material=deal / "server")


def test_material_of_another_model_settings_version_or_party_is_refused(flow: Flow):
    deal, other = flow.deal(1), flow.deal(1, "other")
    with pytest.raises(SecureError, match=r"must be the server's \(got the client's\)"):
        flow.service(material=deal / "client")
    program, _ = lower(cases()["leader"].model, (4, 3, 4))
    for name, protocol in (
        ("model", Protocol.compile(program, flow.protocol.settings)),
        ("settings", Protocol.compile(flow.protocol.program, Settings(gate="dcf"))),
    ):
        deal_to_disk(protocol, 1, flow.folder / name)
        with pytest.raises(SecureError, match="was made for another model or other settings"):
            flow.service(material=flow.folder / name / "server")
    service = flow.service(material=deal / "server")
    with flow.running(service, queries=2):
        with pytest.raises(SecureError, match="both parties need the same deal"):
            flow.query(service, flow.images(1), material=other / "client")
        with pytest.raises(SecureError, match="needs --material DIR"):
            flow.query(service, flow.images(1))
    assert tickets_in(other / "client") == tickets_in(deal / "server") == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deal.json", None, "holds no deal"),
        ("deal.json", b"{", "is torn: it is no JSON"),
        ("deal.json", b"{}", "must be a deal's description"),
        ("mask.key", b"short", r"mask\.key is torn: it must have 16 bytes \(got 5\)"),
        ("mask.key", None, r"mask\.key cannot be read"),
    ],
)
def test_a_damaged_deal_is_refused(name: str, content: bytes | None, message: str, flow: Flow):
    path = flow.deal(1) / "server" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecureError, match=message):
        flow.service(material=path.parent)


def test_a_deal_is_private_and_whole(flow: Flow, monkeypatch: pytest.MonkeyPatch):
    deal = flow.deal(2)
    for path in deal.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert not (deal / "client" / "mask.key").exists()
    assert json.loads((deal / "client" / "deal.json").read_text())["digest"] == flow.protocol.digest
    with pytest.raises(SecureError, match="material is never overwritten"):
        flow.deal(1)
    before = set(flow.folder.iterdir())
    monkeypatch.setattr("deepshare.secure.net.deal.write_ticket", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flow.deal(1, "half")
    assert set(flow.folder.iterdir()) == before
    with pytest.raises(SecureError, match="--count must be at least 1"):
        flow.deal(0, "none")
