"""Which gate backend a network is given: by its gates, its rounds and the link."""

import pytest
from torch import nn

from deepshare.secure.engine.choose import LAN, WAN, Wire, choose_gate, settle, wire_seconds
from deepshare.secure.engine.costs import flights, total
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.errors import SecureError
from deepshare.secure.lower import lower
from deepshare.secure.program import Program


def program(side: int) -> Program:
    """Two ReLUs of 8 channels, 16 side^2 gates."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return lower(nn.Sequential(*layers, *head), (3, side, side))[0]


@pytest.mark.parametrize("weights", ["secret", "public"])
def test_few_gates_or_a_long_way_take_comparison_functions_many_gates_the_tree(weights):
    settings = Settings(weights)
    assert choose_gate(program(4), settings, LAN) == "dcf"
    assert choose_gate(program(96), settings, LAN) == "tree"
    assert choose_gate(program(96), settings, WAN) == "dcf"
    assert choose_gate(program(96), settings, WAN, dealing=True) == "tree"


def test_seconds_are_flights_and_bytes():
    protocol, wire = Protocol.compile(program(8), Settings()), Wire(2.0, 1000.0)
    cost = total(protocol)
    waited = flights(protocol) + max(cost.server_sends, cost.client_sends) / 1000
    assert wire_seconds(protocol, wire, dealing=False) == pytest.approx(waited)
    before = (cost.client_sends_early + cost.dealt_server) / 1000
    assert wire_seconds(protocol, wire, dealing=True) == pytest.approx(waited + before)


def test_a_named_backend_is_taken_and_an_unknown_refused():
    assert settle(program(4), Settings(), "tree", LAN).gate == "tree"
    assert settle(program(4), Settings(), "auto", LAN).gate == "dcf"
    with pytest.raises(SecureError, match="gate must be one of"):
        settle(program(4), Settings(), "yao", LAN)
