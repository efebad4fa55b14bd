"""The oracle itself: what it says where the answer is known by hand, and that planted mistakes do not pass it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from property_cases import calls
from property_runs import hold
from test_properties import check_shared_relu

from deepshare.raw_ops import IMPLEMENTATIONS

REFERENCE = IMPLEMENTATIONS["reference"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_torch_s(dtype: torch.dtype):
    bits = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=torch.Generator().manual_seed(0))
    small = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = torch.finfo(dtype)
    edges = [ends.max * f for f in (1, 1 + ends.eps / 4, 1 + ends.eps / 2, 2)] + [0.0, -0.0, math.inf, -math.inf]
    halves = [ends.smallest_normal * ends.eps * f for f in (0.25, 0.5, 0.75, 1.5, 2.5, -0.5)]
    # through float32, as torch converts; of random bits alone the exponents that float32 has
    wide = torch.cat([bits.view(torch.float64), small, torch.tensor(edges + halves, dtype=torch.float64)]).float()
    values = wide[~wide.isnan()].double()
    ours = oracle.rounded(values.numpy(), dtype)
    assert np.array_equal(ours, values.to(dtype).double().numpy())
    assert np.array_equal(np.signbit(ours), values.to(dtype).signbit().numpy())


def test_values_by_hand():
    x = np.array([[[-1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]])
    call = oracle.SharedReLU(x, np.array([0, 0]), np.array([2.0, 3.0]), np.array([0.0, 1.0]), torch.float32)
    assert call.y().value.tolist() == [[[-0.0, 4.0, 0.0], [3.0, 16.0, 20.0]]]
    found = call.gradients(np.ones_like(x))
    assert found["dx"].value.tolist() == [[[0.0, 2.0, 2.0], [1.0, 4.0, 4.0]]]
    assert found["dalpha"].value.tolist() == [2.0, 9.0]
    assert found["dbeta"].value.tolist() == [1.0, 12.0]


def test_gelu_by_hand():
    x = np.array([[0.5, -1.0]])
    call = oracle.SharedReLU(x, np.arange(2), np.ones(2), np.zeros(2), torch.float64, soft=2)
    leaf = torch.tensor(x, requires_grad=True)
    torch.nn.functional.gelu(leaf).sum().backward()
    np.testing.assert_allclose(call.y().value, torch.nn.functional.gelu(leaf).detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(call.gradients(np.ones_like(x))["dx"].value, leaf.grad.numpy(), rtol=1e-14)


def test_a_share_by_hand():
    one = np.array([[3]], dtype=object)
    share = oracle.Share(
        one, np.array([[True]]), np.array([0]), [5], [7], one * 2, one * 0 - 1, one * 0 + 10, None, 1, 0
    )
    assert share.y().tolist() == [[(3 * (7 + 6 + 5 - 12) - 1 + 10) >> 1]]
    assert oracle.signed(2**63) == -(2**63)


def strict_gate(run: Callable) -> Callable:
    """1[v > 0] in place of 1[v >= 0]: no gate at 0."""

    def wrong(x, residual, source, *rest):  # type: ignore[no-untyped-def]
        y = run(x, residual, source, *rest)
        closed = (x if source is None else source)[:, rest[1].long()] == 0
        hard = rest[4] is None and residual is None and rest[0] is None
        beta = rest[3].reshape((1, -1) + (1,) * (x.dim() - 2))
        return torch.where(closed, (x * beta).to(x.dtype), y) if hard else y

    return wrong


def late_switch(run: Callable) -> Callable:
    """One soft channel too many."""

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        *rest, soft, gamma = arguments
        return run(*rest, None if soft is None else soft + 1, gamma)

    return wrong


def forgotten_residual(run: Callable) -> Callable:
    """A backward pass that recomputes its gates and sums from x alone."""
    return lambda grad, x, residual, *rest: run(grad, x, None, *rest)


def without_gamma(run: Callable) -> Callable:
    """phi(gamma s) without the factor gamma in front: the gradient of a source only."""

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        dx, dsource, *sums = run(*arguments)
        return dx, dsource if arguments[-1] is None else dsource.div_(arguments[-1]), *sums

    return wrong


def lost_term(run: Callable) -> Callable:
    """A sum that leaves out its last position."""

    def wrong(grad, x, *rest):  # type: ignore[no-untyped-def]
        dx, dsource, dalpha, dbeta = run(grad, x, *rest)
        if x.dim() > 2 and x.numel():
            last = grad[-1:, :, -1:].double() * x[-1:, :, -1:]
            dbeta = dbeta - last.flatten(2).sum((0, 2)).to(dbeta)
        return dx, dsource, dalpha, dbeta

    return wrong


def reversed_bits(run: Callable) -> Callable:
    """Gates packed from the high bit down."""

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        y, gates = run(*arguments)
        flipped = sum((gates >> bit & 1) << 7 - bit for bit in range(8))
        return y, torch.as_tensor(flipped, dtype=torch.uint8)

    return wrong


MISTAKES: list[tuple[str, Callable[[Callable], Callable], str]] = [
    ("shared_relu", strict_gate, r"y\["),
    ("shared_relu", late_switch, r"y\["),
    ("shared_relu_backward", late_switch, r"d\w+\["),
    ("shared_relu_backward", forgotten_residual, r"d\w+\["),
    ("shared_relu_backward", without_gamma, r"dsource\["),
    ("shared_relu_backward", lost_term, r"dbeta\["),
    ("shared_relu_emit", reversed_bits, r"assert"),
]


@pytest.mark.parametrize(("op", "mistake", "found"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_found(op: str, mistake: Any, found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REFERENCE, op, mistake(REFERENCE[op]))
    with pytest.raises(AssertionError, match=found):
        hold("reference", calls(400), check_shared_relu, 500, shrink=False)
