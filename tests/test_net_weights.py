"""One deal's weight masks hide one model's weights: another model under them is refused at the server."""

import json
from dataclasses import replace

import pytest
from net_flow import Flow

from deepshare.secure.engine.party import Server
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.errors import SecureError


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Flow:
    return Flow.make(tmp_path_factory.mktemp("flow"))


def retrained(flow: Flow) -> Flow:
    """The same network, keys and protocol with other weights."""
    return replace(flow, tensors={key: value + 1000 for key, value in flow.tensors.items()})


def serve(flow: Flow, deal) -> None:
    """As far as the first query."""
    service = flow.service(material=deal / "server")
    service.stop()
    service.run(None)


def test_masks_used_twice_give_the_difference_away(flow: Flow):
    """Why: a client that was served both models has it without knowing either."""
    key = bytes(16)
    first, second = (Server(each.protocol, each.tensors, key).masked_weights() for each in (flow, retrained(flow)))
    assert flow.protocol.masked_params()
    assert all(bool((second[name] - first[name] == 1000).all()) for name in flow.protocol.masked_params())


def test_another_models_weights_under_a_deals_masks_are_refused(flow: Flow):
    deal = flow.deal(1)
    serve(flow, deal)
    serve(flow, deal)  # the same model again
    with pytest.raises(SecureError, match="were used for another model, and another under the same masks"):
        serve(retrained(flow), deal)
    serve(retrained(flow), flow.deal(1, "another"))


def test_what_is_kept_of_the_weights_is_private_and_confirms_no_guess(flow: Flow):
    """It is made with the deal's key: the same weights give another under another deal."""
    kept = flow.keys / "server" / "weights.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ("first", "second"):
        serve(flow, flow.deal(1, name))
    assert kept.stat().st_mode & 0o777 == 0o600
    first, second = (value for version, value in json.loads(kept.read_text()).items() if version not in before)
    assert first != second


def test_public_weights_leave_no_record(flow: Flow):
    protocol = Protocol.compile(flow.protocol.program, Settings("public", gate="tree"))
    public, kept = replace(flow, protocol=protocol), flow.keys / "server" / "weights.json"
    before = kept.read_text() if kept.exists() else None
    deal = public.deal(1, "public")
    for each in (public, retrained(public)):
        serve(each, deal)
    assert (kept.read_text() if kept.exists() else None) == before


def test_a_damaged_record_is_refused(flow: Flow):
    deal, kept = flow.deal(1, "damaged"), flow.keys / "server" / "weights.json"
    kept.write_text("{")
    with pytest.raises(SecureError, match=r"weights\.json is damaged: which weights are masked cannot be known"):
        serve(flow, deal)
    kept.unlink()
