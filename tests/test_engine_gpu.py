"""The engine with its parties' tensors on a GPU: bit for bit the replay on the CPU."""

import pytest
import torch
from engine_cases import Setup, infer, setup
from secure_cases import cases

from deepshare.secure.engine.party import Client, Server
from deepshare.secure.engine.protocol import Settings
from deepshare.secure.fixed_point import encode
from deepshare.secure.replay import replay

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("settings", [Settings(), Settings("public", gate="tree"), Settings(affine="public")])
@pytest.mark.parametrize("name", ["shared_resnet", "layers", "follower", "mask", "reuse"])
def test_parties_on_a_gpu_are_the_replay(name, settings):
    case = cases()[name]
    host = setup(case.model, case.images, settings)
    server = Server(host.protocol, host.tensors, host.deal.server_key, device="cuda")
    client = Client(host.protocol, server.masked_weights(), device="cuda")
    tickets = host.deal.tickets(0)
    ran = infer(Setup(host.protocol, host.tensors, host.deal, server, client), tickets, case.images)
    reference = replay(host.protocol, host.tensors, host.deal.server_key, tickets, encode(case.images))
    assert ran.server.values[1].is_cuda
    assert torch.equal(ran.logits, reference.logits)
    for index, (first, second) in enumerate(reference.shares):
        assert torch.equal(ran.server.values[index].cpu(), first)
        assert torch.equal(ran.client.values[index].cpu(), second)
