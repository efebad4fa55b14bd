"""The engine between two parties: bit for bit the replay, its costs as predicted, its shares worth nothing alone."""

from dataclasses import replace

import pytest
import torch
from engine_cases import EVERY_SETTING, Ran, Setup, infer, setup
from secure_cases import cases, tiny_resnet

from deepshare.secure.engine import costs
from deepshare.secure.engine.costs import EngineCost
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.replay import replay

NAMES = sorted(cases())


def replayed(parties: Setup, tickets, images):
    key = parties.deal.server_key
    return replay(parties.protocol, parties.tensors, key, tickets, encode(images))


RUNS = [(name, settings) for name in NAMES for settings in (Settings(), Settings("public", gate="tree"))]
RUNS += [(name, settings) for name in ("follower", "shared_resnet") for settings in EVERY_SETTING]


def _name(value: object) -> str:
    return (
        f"{value.weights}-{value.affine}-{value.gate}{value.gate_bits}" if isinstance(value, Settings) else str(value)
    )


@pytest.mark.parametrize(("name", "settings"), dict.fromkeys(RUNS), ids=_name)
def test_parties_are_the_replay_and_cost_what_the_formulas_say(name, settings):
    """Equal bit for bit; rounds and bytes action by action, flights, bytes before the input, sizes of the tickets."""
    case = cases()[name]
    parties = setup(case.model, case.images, settings)
    tickets = parties.deal.tickets(0)
    ran, reference = infer(parties, tickets, case.images), replayed(parties, tickets, case.images)
    assert torch.equal(ran.logits, reference.logits)
    for index, (first, second) in enumerate(reference.shares):
        assert torch.equal(ran.server.values[index], first), parties.protocol.program.steps[index]
        assert torch.equal(ran.client.values[index], second), parties.protocol.program.steps[index]
    assert_costs_are_predicted(parties.protocol, ran, tickets)


def assert_costs_are_predicted(protocol: Protocol, ran: Ran, tickets: tuple[Ticket, Ticket]) -> None:
    for server, client, cost in zip(ran.server.spent, ran.client.spent, costs.predict(protocol), strict=True):
        assert (server.rounds, server.sent, client.sent) == (cost.rounds, cost.server_sends, cost.client_sends)
        assert client.rounds == cost.rounds
    total = costs.total(protocol)
    assert (ran.client.prepared.sent, ran.server.prepared.sent) == (total.client_sends_early, 0)
    assert tuple(ticket.body.numel() for ticket in tickets) == (total.dealt_server, total.dealt_client)
    assert ran.links[1].clock == costs.flights(protocol)


def test_the_logits_are_the_networks():
    """Within what 16 fractional bits allow a small network whose gates are far from 0."""
    case = cases()["resnet"]
    parties = setup(case.model, case.images, Settings())
    got = decode(infer(parties, parties.deal.tickets(0), case.images).logits)
    with torch.no_grad():
        wanted = case.model(case.images).double()
    assert (got - wanted).abs().max() < 2**-11


@pytest.mark.parametrize("settings", EVERY_SETTING, ids=_name)
def test_a_protocol_survives_its_text(settings):
    case = cases()["follower"]
    protocol = setup(case.model, case.images, settings).protocol
    again = Protocol.from_json(protocol.to_json())
    assert (again.digest, again.actions, again.wires) == (protocol.digest, protocol.actions, protocol.wires)


def test_another_setting_or_program_is_another_protocol():
    case = cases()["leader"]
    protocols = [setup(case.model, case.images, settings).protocol for settings in EVERY_SETTING]
    protocols.append(setup(cases()["odd_map"].model, case.images, Settings()).protocol)
    protocols.append(setup(case.model, case.images[:2], Settings()).protocol)
    assert len({protocol.digest for protocol in protocols}) == len(protocols)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weights": "hidden"}, "weights must be one of 'secret', 'public'"),
        ({"gate": "garbled"}, "gate must be one of 'tree', 'dcf'"),
        ({"gate_bits": 16}, "gate_bits must be one of 32, 64"),
        ({"gate_bits": True}, "gate_bits must be one of"),
        ({"batch": 0}, "batch must be an int, 1 or more"),
        ({"batch": True}, "batch must be an int"),
        ({"weights": "public", "affine": "secret"}, "affine must be 'public'"),
    ],
)
def test_bad_settings_are_named(changed, words):
    with pytest.raises(SecureError, match=words):
        Settings(**changed)


def test_foreign_material_is_refused():
    case = cases()["leader"]
    parties, other = (setup(case.model, case.images, settings) for settings in (Settings(), Settings(gate="tree")))
    (server, client), foreign = parties.deal.tickets(0), other.deal.tickets(0)
    for tickets, words in [
        (foreign, "must be of protocol"),
        ((client, server), "for party 0"),
        ((replace(server, body=server.body[:-8]), client), "bytes"),
    ]:
        with pytest.raises(SecureError, match=words):
            infer(parties, tickets, case.images)


def test_images_are_checked_and_an_inference_runs_once():
    case = cases()["leader"]
    parties = setup(case.model, case.images, Settings())
    ran = infer(parties, parties.deal.tickets(0), case.images)
    with pytest.raises(SecureError, match="run once"):
        ran.client.run(encode(case.images))
    for images, words in [(None, "None"), (case.images, "float32"), (encode(case.images[:1]), r"\[1, 4, 3, 4\]")]:
        with pytest.raises(SecureError, match=words):
            ran.client.run(images)
    with pytest.raises(SecureError, match="the client's"):
        ran.server.run(encode(case.images))


def test_targets_of_a_resnet18_with_6k_gates():
    """39 rounds and the opening of the logits with secret weights, 21 with public ones; the carry tree 55 and 37."""
    from deepshare import models
    from deepshare.budget import allocate
    from deepshare.plan import Plan, apply_plan
    from deepshare.secure.lower import lower

    model = models.create("resnet18", num_classes=100, stem_relu=True)
    plan = Plan.of(model, (3, 32, 32))
    found = allocate(plan, "uniform", 6800)
    program, _ = lower(apply_plan(model, found.plan), (3, 32, 32))
    rounds = {
        (weights, gate): costs.total(Protocol.compile(program, Settings(weights, gate=gate)))
        for weights in ("secret", "public")
        for gate in ("dcf", "tree")
    }
    assert {key: cost.rounds - 1 for key, cost in rounds.items()} == {
        ("secret", "dcf"): 39,
        ("secret", "tree"): 55,
        ("public", "dcf"): 21,
        ("public", "tree"): 37,
    }
    secret, public = rounds["secret", "dcf"], rounds["public", "dcf"]
    assert secret.one_way < 9_000_000 > 0
    assert public.one_way < 4_500_000
    assert costs.flights(Protocol.compile(program, Settings())) == 36


def test_cost_adds_up():
    assert EngineCost(1, 2, 3, 4, 5, 6) + EngineCost(1, 1, 1, 1, 1, 1) == EngineCost(2, 3, 4, 5, 6, 7)
    assert EngineCost(1, 2, 3).one_way == 3


def test_two_inferences_of_one_party_need_two_tickets():
    model, images = tiny_resnet(2), cases()["shared_resnet"].images
    parties = setup(model, images, Settings())
    first, second = (infer(parties, parties.deal.tickets(number), images) for number in (0, 1))
    assert (first.logits - second.logits).abs().max() < 64  # in units: truncations differ, nothing else
    assert not torch.equal(first.server.values[3], second.server.values[3])
