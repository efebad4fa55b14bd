"""What must hold between calls of the operators, whatever their values: relations, each on random calls."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from operator_cases import LAYOUTS, laid_out, truncates
from property_cases import Call, Maker, Tensors, calls, run, tensors_of
from property_runs import BACKENDS, QUIET, assert_same_bits, hold, interpreted
from torch import Tensor

from deepshare import ChannelMap, masked_relu, pack_gates, shared_relu

GRADIENTS = ("dx", "dsource", "dalpha", "dbeta")


def elements(backend: str) -> int:
    return 100 if interpreted(backend) else 800


def count(backend: str) -> int:
    return 17 if interpreted(backend) else 60


def stored_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).copy_(values)


def exact_type(call: Call, backend: str) -> Call:
    """Not bfloat16 under Triton's interpreter, which truncates a fused sum and reads a negative subnormal as 0."""
    return replace(call, dtype=torch.float16) if truncates(backend, call.dtype) else call


def check_residual(call: Call, backend: str) -> None:
    """Fused and unfused additions give the same bits."""
    call = replace(exact_type(call, backend), with_residual=True, return_gates=False)
    given = tensors_of(call, backend)
    fused = run(call, given, backend)
    total = stored_like(given.x + given.residual, given.x)
    plain = run(replace(call, with_residual=False), replace(given, x=total, residual=None), backend)
    for name in ("y", *GRADIENTS):
        assert_same_bits(getattr(fused, name), getattr(plain, name), name)


def assert_same_sums(one: Tensor | None, other: Tensor | None, given: Tensors, name: str) -> None:
    """Of grad * x over all but the channels: equal up to the rounding of a sum in another order."""
    assert (one is None) == (other is None), name
    if one is None or other is None:
        return
    x = given.x if given.residual is None else given.x + given.residual
    terms = (given.grad.double() * x.double()).abs().transpose(0, 1).flatten(1)
    bound = 2 * torch.finfo(one.dtype).eps * terms.shape[1] * terms.sum(1)
    same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= bound)
    assert bool(same.all()), f"{name}: {one} and {other} are further apart than rounding"


def check_packed(call: Call, backend: str) -> None:
    """A follower of packed gates gives the bits of a follower of the leader's pre-activation; its sums their values.

    Sums over a tensor of few positions may be taken in another order.
    """
    call = replace(exact_type(call, backend), gates="source", soft=0, soft_as_tensor=False, return_gates=False)
    given = tensors_of(call, backend)
    by_source = run(call, given, backend)
    packed = replace(given, source=None, packed=pack_gates(given.source >= 0))
    by_bits = run(replace(call, gates="packed"), packed, backend)
    for name in ("y", "dx"):
        assert_same_bits(getattr(by_source, name), getattr(by_bits, name), name)
    for name in ("dalpha", "dbeta"):
        assert_same_sums(getattr(by_source, name), getattr(by_bits, name), given, name)


def check_emission(call: Call, backend: str) -> None:
    """Returning the gates changes no value, and they are the leader's."""
    call = replace(call, gates="own", soft=0, soft_as_tensor=False, return_gates=True)
    given = tensors_of(call, backend)
    leader = run(call, given, backend)
    silent = run(replace(call, return_gates=False), given, backend)
    for name in ("y", "dx", "dalpha", "dbeta"):
        assert_same_bits(getattr(leader, name), getattr(silent, name), name)
    follower = run(replace(call, gates="packed"), replace(given, packed=leader.gates), backend)
    assert_same_bits(follower.y, leader.y, "y of a follower of its own gates")


def check_layout(call: Call, backend: str) -> None:
    """Where hard gates decide, no value depends on where a tensor lies."""
    call = replace(call, soft=0, soft_as_tensor=False)
    given = tensors_of(call, backend)
    draw = Maker(call.seed + 1, "none", call.dtype, str(given.x.device)).draw

    def elsewhere(tensor: torch.Tensor | None) -> torch.Tensor | None:
        layouts = [layout for layout in LAYOUTS if layout != "expanded"]  # which repeats values
        return None if tensor is None else laid_out(tensor, draw.choice(layouts), draw)

    moved = Tensors(
        **{name: elsewhere(getattr(given, name)) for name in ("x", "grad", "residual", "source")},
        packed=None if given.packed is None else pack_gates(elsewhere(given.packed.unpack())),
        alpha=given.alpha,
        beta=given.beta,
        channel_map=given.channel_map,
    )
    here, there = (run(call, tensors, backend) for tensors in (given, moved))
    for name in ("y", "dx"):
        assert_same_bits(getattr(here, name), getattr(there, name), name)


def check_relu(call: Call, backend: str) -> None:
    """P = C, alpha 1, beta 0 is ReLU; so is a mask of ones; a mask of zeros is the identity."""
    given = tensors_of(replace(call, gates="own", specials="zeros"), backend)
    channels = call.shape[1]
    own = ChannelMap.balanced(channels, channels).to(given.x.device)
    one, zero = torch.ones(channels, device=given.x.device), torch.zeros(channels, device=given.x.device)
    expected = torch.relu(given.x)
    assert torch.equal(shared_relu(given.x, own, one, zero, backend=backend), expected)
    everywhere = torch.ones(call.shape[1:], device=given.x.device)
    assert torch.equal(masked_relu(given.x, everywhere, backend=backend), expected)
    assert torch.equal(masked_relu(given.x, everywhere == 0, backend=backend), given.x)


def check_mask_per_channel(call: Call, backend: str) -> None:
    """A mask per channel is shared_relu with alpha = mask, beta = 1 - mask, and masked_relu with the mask spread."""
    given = tensors_of(replace(call, specials="small"), backend)
    generator = torch.Generator().manual_seed(call.seed)
    channels, device = call.shape[1], given.x.device
    mask = torch.randint(0, 2, (channels,), generator=generator).to(device, torch.float32)
    own = ChannelMap.balanced(channels, channels).to(device)
    spread = mask.reshape(-1, *[1] * (given.x.dim() - 2)).expand(call.shape[1:])
    results = []
    for form in ("channel", "pixel", "shared"):
        x = given.x.detach().requires_grad_()
        if form == "shared":
            y = shared_relu(x, own, mask, 1 - mask, backend=backend)
        else:
            y = masked_relu(x, mask if form == "channel" else spread, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, x, given.grad)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


RELATIONS = {
    check.__name__.removeprefix("check_"): check
    for check in (check_residual, check_packed, check_emission, check_layout, check_relu, check_mask_per_channel)
}


@QUIET
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_relation(backend: str, relation: str):
    strategy: st.SearchStrategy[Call] = calls(elements(backend))
    hold(backend, strategy, RELATIONS[relation], count(backend))
