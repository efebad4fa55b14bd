"""The CPU kernels of shared_relu with every operand: residuals, sources, packed gates, emitted gates, bit by bit."""

import itertools
import math

import pytest
import torch
from test_native import NATIVE, OPS
from torch import Tensor

from deepshare import ChannelMap
from deepshare.kernels import reference
from deepshare.kernels.packing import pack_bits

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ORDERS = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "permuted": (3, 1, 0, 2)}
PLANES = ((1, 1), (1, 7), (3, 3), (4, 4), (7, 7), (14, 14))
CHANNELS, PROTOTYPES = 20, (1, 3, 8, 9, 20)
KINDS = ("own", "source", "gates")
# [N, C, H, W], P: pixels of several tiles, long and periodic strings of bits, tiles cut within a row, no channel
# to share with
LARGER = [
    ((150, 70, 1, 1), 65),
    ((9, 200, 8, 9), 70),
    ((3, 130, 5, 1), 33),
    ((2, 5, 70, 130), 2),
    ((67, 1, 2, 2), 1),
]


def stored(values: Tensor, order: tuple[int, ...]) -> Tensor:
    return values.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """-4 .. 4, zeros of both signs: sums of such products are exact in float32, whatever their order."""
    values = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, torch.full_like(values, -0.0), values)


def random_map(channels: int, prototypes: int, seed: int) -> ChannelMap:
    if seed % 2 == 0:
        return ChannelMap.balanced(channels, prototypes)
    generator = torch.Generator().manual_seed(seed)
    return ChannelMap(torch.randint(prototypes, (channels,), generator=generator, dtype=torch.int32), prototypes)


def operands(shape, prototypes: int, dtype: torch.dtype, order, kind: str, with_residual: bool, seed: int):
    """(grad, [x, residual, source, gates], channel map, alpha, beta)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad, residual = (stored(integers(shape, dtype, generator), order) for _ in range(3))
    alpha, beta = (torch.randn(shape[1], generator=generator).to(wide) for _ in range(2))
    leader = (shape[0], prototypes + (seed % 3 if kind == "source" else 0), *shape[2:])
    source = integers(leader, dtype, generator)
    gates = pack_bits(source >= 0, torch.empty_like(x)) if kind == "gates" else None
    given = [x, residual if with_residual else None, stored(source, order) if kind == "source" else None, gates]
    return grad, given, random_map(shape[1], prototypes, seed), alpha, beta


def hard(given: list, grad: Tensor, channel_map: ChannelMap, alpha: Tensor, beta: Tensor, ops: tuple) -> list[Tensor]:
    """y, dx, dsource, dalpha, dbeta."""
    pi, members, offsets = channel_map.pi, channel_map.members, channel_map.offsets
    y = ops[0](*given, pi, alpha, beta, None, None)
    return [y, *ops[1](grad, *given, pi, members, offsets, alpha, beta, None, None)]


def assert_same_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    """NaN wherever NaN is wanted, and elsewhere every bit, signs of zeros too."""
    assert got.dtype == wanted.dtype, what
    assert got.stride() == wanted.stride(), what
    assert torch.equal(got.isnan(), wanted.isnan()), what
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    zero = torch.zeros((), dtype=got.dtype)
    ours, theirs = (torch.where(wanted.isnan(), zero, t).contiguous().view(bits) for t in (got, wanted))
    assert torch.equal(ours, theirs), what


def check(shape, prototypes: int, dtype: torch.dtype, order, kind: str, with_residual: bool, seed: int) -> None:
    what = f"{shape=} {prototypes=} {dtype} {order=} {kind} {with_residual=} {seed=}"
    grad, given, channel_map, alpha, beta = operands(shape, prototypes, dtype, order, kind, with_residual, seed)
    rest = (grad, channel_map, alpha, beta)
    ours = hard(given, *rest, ops=(OPS.shared_relu_native, OPS.shared_relu_backward_native))
    expected = hard(given, *rest, ops=(reference.shared_relu, reference.shared_relu_backward))
    for got, wanted in zip(ours, expected, strict=True):
        assert_same_bits(got, wanted, what)
    if kind == "own":
        emit = (given[0], given[1], channel_map.pi, alpha, beta, prototypes)
        y, gates = OPS.shared_relu_emit_native(*emit)
        wanted_y, wanted_gates = reference.shared_relu_emit(*emit)
        assert_same_bits(y, wanted_y, what)
        assert torch.equal(gates, wanted_gates), what


@NATIVE
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_calls_have_the_bits_of_the_reference(dtype: torch.dtype, kind: str, with_residual: bool):
    cases = itertools.product(PLANES, PROTOTYPES, ORDERS.values())
    for seed, (plane, prototypes, order) in enumerate(cases):
        check((3, CHANNELS, *plane), prototypes, dtype, order, kind, with_residual, seed)


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "prototypes"), LARGER)
def test_hard_calls_of_many_tiles_have_the_bits_of_the_reference(shape, prototypes: int, kind: str):
    for seed, (dtype, order) in enumerate(itertools.product((torch.float32, torch.bfloat16), ORDERS.values())):
        check(shape, prototypes, dtype, order, kind, with_residual=False, seed=seed)
        check(shape, prototypes, dtype, order, kind, with_residual=True, seed=seed + 1)


@NATIVE
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_keep_their_bits(dtype: torch.dtype, order):
    specials = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e-8, 6e4, -1.0], dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for seed, plane in enumerate(PLANES):
        grad, given, channel_map, alpha, beta = operands((3, 20, *plane), 9, dtype, order, "own", True, seed)
        for tensor in (grad, given[0], given[1]):
            tensor.copy_(specials[torch.randint(len(specials), tensor.shape, generator=generator)])
        rest = (grad, channel_map, alpha, beta)
        ours = hard(given, *rest, ops=(OPS.shared_relu_native, OPS.shared_relu_backward_native))
        expected = hard(given, *rest, ops=(reference.shared_relu, reference.shared_relu_backward))
        for got, wanted in zip(ours[:2], expected[:2], strict=True):
            assert_same_bits(got, wanted, f"{plane}")


@NATIVE
@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_of_a_soft_call_is_added_first(dtype: torch.dtype, order, with_source: bool):
    """The same bits as of the sum, in every result."""
    switch, wide = torch.tensor(13, dtype=torch.int32), torch.float64 if dtype == torch.float64 else torch.float32
    gamma = torch.tensor(1.25, dtype=wide)
    for seed, plane in enumerate(PLANES):
        kind = "source" if with_source else "own"
        grad, given, channel_map, alpha, beta = operands((3, 20, *plane), 8, dtype, order, kind, True, seed)
        generator = torch.Generator().manual_seed(seed)
        for tensor in given[:2]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        results = []
        for x, residual in (given[:2], (given[0] + given[1], None)):
            operand = (x, residual, given[2], None, channel_map.pi)
            y = OPS.shared_relu_native(*operand, alpha, beta, switch, gamma)
            inverse = (channel_map.members, channel_map.offsets)
            gradients = OPS.shared_relu_backward_native(grad, *operand, *inverse, alpha, beta, switch, gamma)
            results.append([y, *gradients])
        for fused, separate in zip(*results, strict=True):
            assert_same_bits(fused, separate, f"{plane}")


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "prototypes"), [((9, 64, 40, 40), 16), ((3, 5, 70, 300), 2), ((6000, 24, 1, 1), 7)])
def test_bits_do_not_depend_on_the_number_of_threads(shape, prototypes: int, kind: str):
    before, results = torch.get_num_threads(), []
    for order in (ORDERS["contiguous"], ORDERS["channels_last"]):
        grad, given, channel_map, alpha, beta = operands(shape, prototypes, torch.float32, order, kind, True, seed=3)
        given[0].normal_(generator=torch.Generator().manual_seed(5))  # sums of which the order shows
        rest = (grad, channel_map, alpha, beta)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(hard(given, *rest, ops=(OPS.shared_relu_native, OPS.shared_relu_backward_native)))
        finally:
            torch.set_num_threads(before)
        for other in results[-2:]:
            assert all(torch.equal(a, b) for a, b in zip(results[-3], other, strict=True))


@NATIVE
def test_emitted_bits_beyond_a_run_are_zero():
    for shape, order in (((2, 5, 3, 7), (0, 1, 2, 3)), ((2, 5, 3, 7), (0, 2, 3, 1)), ((2, 5, 1, 5), (0, 1, 2, 3))):
        x = stored(torch.ones(shape), order)
        channel_map = ChannelMap.balanced(5, 3)
        gates = OPS.shared_relu_emit_native(x, None, channel_map.pi, torch.ones(5), torch.zeros(5), 3)[1]
        assert sum(int(byte).bit_count() for byte in gates.flatten()) == 2 * 3 * shape[2] * shape[3]
