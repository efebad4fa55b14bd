"""The label alone: the argmax of the logits, bit for bit the replay, in ceil(log2 k) levels of two rounds."""

from dataclasses import replace

import pytest
import torch
from engine_cases import Setup, infer
from secure_cases import cases, tiny_resnet
from torch import nn

from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine import costs
from deepshare.secure.engine.party import Client, Server
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import encode
from deepshare.secure.label import with_label
from deepshare.secure.lower import lower
from deepshare.secure.program import Program
from deepshare.secure.replay import replay


def labelled(model: nn.Module, images: torch.Tensor, settings: Settings) -> Setup:
    program, tensors = lower(model, (images.shape[1], images.shape[2], images.shape[3]))
    protocol = Protocol.compile(with_label(program), replace(settings, batch=len(images)))
    deal = Deal(protocol)
    server = Server(protocol, tensors, deal.server_key)
    return Setup(protocol, tensors, deal, server, Client(protocol, server.masked_weights()))


def classifier(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


@pytest.mark.parametrize("classes", [2, 3, 5, 8, 10, 17])
def test_label_is_the_argmax(classes):
    torch.manual_seed(classes)
    model, images = classifier(classes), torch.randn(6, 3, 2, 2)
    parties = labelled(model, images, Settings(gate="tree"))
    tickets = parties.deal.tickets(0)
    ran = infer(parties, tickets, images)
    with torch.no_grad():
        assert torch.equal(ran.logits.reshape(-1), model(images).argmax(1))
    reference = replay(parties.protocol, parties.tensors, parties.deal.server_key, tickets, encode(images))
    assert torch.equal(ran.logits, reference.logits)
    for index, (first, second) in enumerate(reference.shares):
        assert torch.equal(ran.server.values[index], first)
        assert torch.equal(ran.client.values[index], second)


def test_label_of_a_network_and_its_costs():
    """2 rounds a level more than the logits with comparison functions; what is sent last is one word an image."""
    case = cases()["shared_resnet"]
    model = tiny_resnet(2)
    parties = labelled(model, case.images, Settings())
    ran = infer(parties, parties.deal.tickets(0), case.images)
    with torch.no_grad():
        assert torch.equal(ran.logits.reshape(-1), model(case.images).argmax(1))
    program, _ = lower(model, (1, 8, 8))
    plain = costs.total(Protocol.compile(program, Settings(batch=3)))
    levels = (program.steps[-1].shape[0] - 1).bit_length()
    assert costs.total(parties.protocol).rounds == plain.rounds + 2 * levels
    assert costs.predict(parties.protocol)[-1].server_sends == 8 * len(case.images)
    assert sum(spent.rounds for spent in ran.client.spent) == plain.rounds + 2 * levels


def test_a_label_survives_the_protocols_text():
    program, _ = lower(classifier(3), (3, 2, 2))
    protocol = Protocol.compile(with_label(program), Settings())
    again = Protocol.from_json(protocol.to_json())
    assert (again.digest, again.program.reveals) == (protocol.digest, "label")
    assert Program.from_plain(program.to_plain()).reveals == "logits"


def test_what_has_no_classes_has_no_label():
    program, _ = lower(cases()["layers"].model, (4, 3, 4))
    shape = program.steps[-1].shape
    if len(shape) != 1 or shape[0] < 2:
        with pytest.raises(SecureError, match="a label needs logits"):
            with_label(program)
    single, _ = lower(classifier(1), (3, 2, 2))
    with pytest.raises(SecureError, match=r"got a result of shape \[1\]"):
        with_label(single)
