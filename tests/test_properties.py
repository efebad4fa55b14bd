"""Random calls of every operator on every backend, drawn by hypothesis, against the oracle (tests/oracle.py).

`make test` draws 500 cases of shared_relu and 150 of each other operator for a compiled backend (100 for the
reference), `-m slow` 10,000 of each. Triton's interpreter takes 0.1 s a case: its 500 in `make test` are 300 of
shared_relu, 50 of each other operator and 17 of each relation (test_relations.py), on tensors of 120 elements.

Hard gates are compared bit for bit: the sum of a residual is rounded before its sign is taken, and rounding keeps a
sign, so that no band around 0 is left in which two gates might both be right. Triton's interpreter is the exception: it
reads subnormal bfloat16 as 0, so what hangs on one is not compared, and hypothesis' statistics count such cases
(--hypothesis-show-statistics).
"""

from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import event
from hypothesis import strategies as st
from operator_cases import DTYPES, LAYOUTS, device_of, laid_out, truncates
from property_cases import MAPS, SPECIALS, Call, Maker, Outcome, Tensors, calls, oracle_of, run, shapes, tensors_of
from property_runs import BACKENDS, MANY, QUIET, assert_same_bits, hold, interpreted, largest
from torch import Tensor

from deepshare import PackedGates, masked_relu, pack_gates, shared_relu_share


def assert_meets(name: str, got: Tensor, expected: oracle.Expected, dtype: torch.dtype) -> None:
    """Values as the oracle says; a gradient of alpha or beta is stored in `dtype`, wider or narrower than its sum."""
    assert got.dtype == dtype, f"{name} is {got.dtype}"
    values = oracle.numbers(got)
    assert values.shape == expected.value.shape, f"{name} is {values.shape}"
    if expected.free.any():
        event(f"{name}: the order of operations or a subnormal decides some elements")
    wrong = expected.misses(values)
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(
            f"{name}{list(at)} is {values[at]!r}, the oracle says {expected.value[at]!r} +- {expected.error[at]:.3g} "
            f"({wrong.sum()} of {wrong.size} elements)"
        )


def narrowed(expected: oracle.Expected, dtype: torch.dtype) -> oracle.Expected:
    """A sum stored in alpha's dtype."""
    if torch.finfo(dtype).bits > 16:
        return expected
    info = torch.finfo(dtype)
    with np.errstate(all="ignore"):
        size = np.where(np.isfinite(expected.value), np.abs(expected.value) + expected.error, 0.0)
    error = np.where(np.isfinite(expected.value), expected.error + info.eps * size + info.smallest_normal * info.eps, 0)
    return oracle.Expected(expected.value, error, expected.free | (size + error >= info.max))


def check_values(call: Call, given: Tensors, result: Outcome, backend: str) -> None:
    expected = oracle_of(call, given, backend)
    assert_meets("y", result.y, expected.y(), call.dtype)
    gradients = expected.gradients(oracle.numbers(given.grad))
    assert_meets("dx", result.dx, gradients["dx"], call.dtype)
    for name, vector in (("dalpha", given.alpha), ("dbeta", given.beta)):
        assert_meets(name, getattr(result, name), narrowed(gradients[name], vector.dtype), vector.dtype)
    if given.residual is not None:
        assert_same_bits(result.dresidual, result.dx, "the residual's gradient")
    if given.source is None or (call.soft == 0 and not call.soft_as_tensor):
        assert result.dsource is None
    elif "dsource" in gradients:
        assert_meets("dsource", result.dsource, gradients["dsource"], call.dtype)
    else:  # the switch as a tensor has come to 0
        assert not result.dsource.any()
    if call.return_gates:
        check_gates(call, given, result, expected)


def check_gates(call: Call, given: Tensors, result: Outcome, expected: oracle.SharedReLU) -> None:
    """What a leader returns: exact gates in the promised layout, or its prototypes' z, which torch sums; what a
    follower returns: its source."""
    gates = result.gates
    if given.packed is not None:
        assert gates is given.packed
    elif given.source is not None:
        assert isinstance(gates, Tensor)
        assert gates.data_ptr() == given.source.data_ptr()
    elif isinstance(gates, Tensor):
        assert call.soft_as_tensor or call.soft > 0
        z = given.x if given.residual is None else given.x + given.residual
        assert_same_bits(gates, z.detach()[:, : call.prototypes], "the prototypes' z")
    else:
        assert isinstance(gates, PackedGates)
        assert (gates.prototypes, gates.shape, gates.strides) == (call.prototypes, call.shape, result.y.stride())
        leader, unsure = expected.leader_gates(), expected.near_zero(expected.z[:, : call.prototypes])
        got = gates.unpack().cpu().numpy()
        assert got.shape == leader.shape
        assert ((got == leader) | unsure).all()
        if got.size and not unsure.any():
            assert np.array_equal(gates.bits.cpu().numpy(), oracle.packed(leader, result.y.stride()))


def check_shared_relu(call: Call, backend: str) -> None:
    given = tensors_of(call, backend)
    before = [t.clone() for t in operands(given)]
    result = run(call, given, backend)
    for tensor, copy in zip(operands(given), before, strict=True):
        assert_same_bits(tensor, copy, "an input")
    assert result.y.stride() == result.dx.stride() == torch.empty_like(given.x).stride()
    if result.dsource is not None:
        assert result.dsource.stride() == torch.empty_like(given.source).stride()
    check_values(call, given, result, backend)
    if not interpreted(backend) or call.seed % 8 == 0:
        again = run(call, given, backend)
        for name in ("y", "dx", "dresidual", "dsource", "dalpha", "dbeta"):
            assert_same_bits(getattr(result, name), getattr(again, name), f"{name} of a second run")


def operands(given: Tensors) -> list[Tensor]:
    bits = None if given.packed is None else given.packed.bits
    found = [given.x, given.grad, given.residual, given.source, bits, given.alpha, given.beta]
    return [t for t in found if t is not None]


@QUIET
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_relu_is_what_the_oracle_says(backend: str):
    count = 300 if interpreted(backend) else 100 if backend == "reference" else 500
    hold(backend, calls(largest(backend)), check_shared_relu, count)


@QUIET
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_relu_is_what_the_oracle_says_ten_thousand_times(backend: str):
    hold(backend, calls(largest(backend)), check_shared_relu, MANY)


@dataclass(frozen=True)
class MaskedCall:
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layouts: tuple[str, ...]  # of x, grad, mask
    specials: str
    mask_kind: str  # bool | float32 | bfloat16 | float64


def masked_calls(most: int) -> st.SearchStrategy[MaskedCall]:
    return st.builds(
        MaskedCall,
        seed=st.integers(0, 2**31 - 1),
        shape=shapes(most),
        dtype=st.sampled_from(DTYPES),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
        specials=st.sampled_from(SPECIALS),
        mask_kind=st.sampled_from(["bool", "float32", "bfloat16", "float64"]),
    )


def mask_of(call: MaskedCall, maker: Maker) -> Tensor:
    """[C, *S]: zeros and ones, and among floating ones a third of other values, some outside 0..1."""
    kinds = torch.randint(0, 3, call.shape[1:], generator=maker.generator)
    values = torch.randn(call.shape[1:], generator=maker.generator, dtype=torch.float64)
    values = torch.where(kinds < 2, kinds.double(), values)
    if call.mask_kind == "bool":
        mask = (kinds == 1).to(maker.device)
    else:
        mask = values.to(maker.device, torch.float64 if call.dtype == torch.float64 else getattr(torch, call.mask_kind))
    return laid_out(mask.unsqueeze(0), call.layouts[2], maker.draw)[0]


def check_masked_relu(call: MaskedCall, backend: str) -> None:
    maker = Maker(call.seed, call.specials, call.dtype, device_of(backend))
    if truncates(backend, call.dtype):  # the interpreter's rounding is not the oracle's
        call = replace(call, dtype=torch.float16)
        maker = Maker(call.seed, call.specials, call.dtype, device_of(backend))
    x, grad = (maker.activation(call.shape, layout).detach() for layout in call.layouts[:2])
    mask = mask_of(call, maker)
    learned = mask.is_floating_point()
    leaf, weight = x.detach().requires_grad_(), mask.detach().requires_grad_(learned)
    y = masked_relu(leaf, weight, backend=backend)
    dx, *dmask = torch.autograd.grad(y, [leaf, weight][: 1 + learned], grad)
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    expected = oracle.MaskedReLU(oracle.numbers(x), oracle.numbers(mask.to(wide)), call.dtype)
    expected_dx, expected_dmask = expected.gradients(oracle.numbers(grad))
    assert_meets("y", y, expected.y(), call.dtype)
    assert_meets("dx", dx, expected_dx, call.dtype)
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()
    if learned:
        assert_meets("dmask", dmask[0], narrowed(expected_dmask, mask.dtype), mask.dtype)


@dataclass(frozen=True)
class ShareCall:
    seed: int
    shape: tuple[int, ...]
    prototypes: int
    map_kind: str
    layouts: tuple[str, ...]  # of opened, gates, flip, offset, toggle
    with_scale: bool
    extremes: bool  # the ends of the 64-bit range among the values
    shift: int
    party: int


@st.composite
def share_calls(draw: st.DrawFn, most: int) -> ShareCall:
    shape = draw(shapes(most))
    kind = draw(st.sampled_from(MAPS))
    return ShareCall(
        seed=draw(st.integers(0, 2**31 - 1)),
        shape=shape,
        prototypes=shape[1] if kind == "identity" else draw(st.integers(1, shape[1])),
        map_kind=kind,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(5)),
        with_scale=draw(st.booleans()),
        extremes=draw(st.booleans()),
        shift=draw(st.sampled_from([0, 1, 16, 20, 63])),
        party=draw(st.integers(0, 1)),
    )


def check_share(call: ShareCall, backend: str) -> None:
    maker = Maker(call.seed, "none", torch.float64, device_of(backend))
    channels, leader = call.shape[1], (call.shape[0], call.prototypes, *call.shape[2:])

    def integers(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
        values = torch.randint(-(2**63), 2**63 - 1, shape, generator=maker.generator)
        if call.extremes:
            ends = torch.tensor([-(2**63), -(2**63) + 1, 2**63 - 1, 0, -1, 1])
            values = ends[torch.randint(0, len(ends), shape, generator=maker.generator)]
        return laid_out(values.to(maker.device), layout, maker.draw)

    given = {
        name: integers(leader if name == "flip" and call.with_scale else call.shape, layout)
        for name, layout in zip(("opened", "flip", "offset", "toggle"), call.layouts, strict=False)
    }
    vectors = {name: integers((channels,)) for name in ("alpha", "beta", "scale")}
    opens = laid_out((integers(leader) & 1).bool(), call.layouts[4], maker.draw)
    channel_map = maker.map_of(channels, call.prototypes, call.map_kind)
    if not call.with_scale:
        del vectors["scale"]
    state = {"party": call.party, "shift": call.shift}
    gates = pack_gates(opens)
    y = shared_relu_share(gates=gates, channel_map=channel_map, backend=backend, **given, **vectors, **state)
    assert y.stride() == torch.empty_like(given["opened"]).stride()
    plain = {name: vector.tolist() for name, vector in vectors.items()}
    expected = oracle.Share(
        **{name: tensor.cpu().numpy().astype(object) for name, tensor in given.items()},
        **{"scale": None, **plain},
        gates=opens.cpu().numpy(),
        pi=channel_map.pi.cpu().numpy().astype(np.int64),
        **state,
    )
    assert np.array_equal(y.cpu().numpy(), expected.y())


OTHERS = {"masked_relu": (masked_calls, check_masked_relu), "share": (share_calls, check_share)}


@QUIET
@pytest.mark.parametrize("op", OTHERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_relu_and_the_share_are_what_the_oracle_says(backend: str, op: str):
    strategy, check = OTHERS[op]
    hold(backend, strategy(min(largest(backend), 400)), check, 50 if interpreted(backend) else 150)


@QUIET
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", OTHERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_relu_and_the_share_ten_thousand_times(backend: str, op: str):
    strategy, check = OTHERS[op]
    hold(backend, strategy(min(largest(backend), 400)), check, MANY)
