"""The Triton kernels' residuals, packed gates and emitted gates, as raw ops, against the reference and themselves.

Shapes: runs of every access width and none, channels last, prototypes within a byte, one byte, and beyond it.
"""

import math
from itertools import product

import pytest
import torch
from interpreter import round_to_nearest
from operator_cases import INTERPRETED, backend_parameters, device_of
from torch import Tensor

from deepshare import ChannelMap
from deepshare.kernels import reference
from deepshare.kernels.layout import Geometry, memory_order
from deepshare.kernels.packing import pack_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORDERS = {"contiguous": (0, 1, 2), "channels_last": (0, 2, 1), "permuted": (2, 1, 0)}
# [N, C, S] and P: runs of 7 and 9 in sample blocks (16, 9 channels), a multiple of a vector, single positions
SHAPES = [((3, 16, 7), 8), ((2, 9, 9), 3), ((3, 8, 16), 8), ((5, 9, 1), 9), ((2, 3, 2), 1)]
DEVICE = device_of("triton")
pytestmark = [mark for parameter in backend_parameters() if parameter.values == ("triton",) for mark in parameter.marks]


@pytest.fixture(autouse=True)
def rounding_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        round_to_nearest(monkeypatch)


def ops():
    from deepshare.kernels import triton_ops

    return triton_ops


def drawn(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...], seed: int) -> Tensor:
    """Normal values with zeros, negative zeros and a NaN among them, stored in this order."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[values.abs() < 0.05] = 0.0
    values[(values > 0.05) & (values < 0.1)] = -0.0
    values.view(-1)[seed % values.numel()] = math.nan
    stored = values.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
    return stored.to(DEVICE, dtype)


class Call:
    """The tensors of one call of the raw ops."""

    def __init__(self, shape: tuple[int, ...], prototypes: int, dtype: torch.dtype, order: tuple[int, ...], kind: str):
        self.prototypes = min(prototypes, shape[1])
        self.x, self.residual, self.grad = (drawn(shape, dtype, order, seed) for seed in (1, 2, 3))
        self.source = drawn((shape[0], self.prototypes + 2, *shape[2:]), dtype, order, 4)
        pi = torch.randint(0, self.prototypes, shape[1:2], generator=torch.Generator().manual_seed(5))
        fewer = ChannelMap(pi, self.prototypes) if kind == "random" else ChannelMap.balanced(shape[1], self.prototypes)
        self.map = fewer.to(DEVICE)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.alpha, self.beta = (torch.linspace(-2, low, shape[1], dtype=self.wide, device=DEVICE) for low in (1, 3))
        # gates of a leader with more prototypes than these channels look at
        opens = self.source[:, : self.prototypes + 1] >= 0
        self.gates = pack_bits(opens, torch.empty_like(self.x))

    def soft(self) -> tuple[Tensor, Tensor]:
        channels = torch.tensor(self.x.shape[1] // 2, dtype=torch.int32, device=DEVICE)
        return channels, torch.tensor(1.3, dtype=self.wide, device=DEVICE)

    def run(self, module, x, residual, source=None, gates=None, soft=(None, None)) -> tuple[Tensor, ...]:
        """(y, dx, dsource, dalpha, dbeta)"""
        leaders, affine = (x, residual, source, gates, self.map.pi), (self.alpha, self.beta)
        y = module.shared_relu(*leaders, *affine, *soft)
        maps = (self.map.members, self.map.offsets)
        return y, *module.shared_relu_backward(self.grad, *leaders, *maps, *affine, *soft)


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Values (NaN where NaN is), dtypes and strides."""
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_hard(call: Call, ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """y and dx have the same bits; sums are within the error of another order of adding (operator_cases.bounds)."""
    assert_same(ours[:3], expected[:3])
    z = (call.x + call.residual).nan_to_num()
    terms = (z.double() * call.grad.nan_to_num().double()).abs().sum([0, *range(2, z.dim())])
    bound = (6 * math.sqrt(z.numel() / z.shape[1]) + 2) * torch.finfo(call.wide).eps * (terms + 1)
    for got, wanted in zip(ours[3:], expected[3:], strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert ((got - wanted).abs().double() <= bound).logical_or(got.isnan()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
def test_a_residual_is_an_addition_of_its_own(shape, prototypes, dtype):
    """All outputs, soft and hard, with and without a source, have the bits that they have without fusion."""
    order = list(ORDERS.values())[sum(shape) % 3]
    call = Call(shape, prototypes, dtype, order, "random")
    z = torch.empty_like(call.x).copy_(call.x + call.residual)
    for source, soft in product((None, call.source), ((None, None), call.soft())):
        fused = call.run(ops(), call.x, call.residual, source, soft=soft)
        assert_same(fused, call.run(ops(), z, None, source, soft=soft))


@pytest.mark.parametrize("kind", ["balanced", "random"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
def test_hard_gates_from_a_residual_and_from_bits(shape, prototypes, order, kind):
    call = Call(shape, prototypes, DTYPES[(len(order) + shape[1]) % 4], ORDERS[order], kind)
    for gates in (None, call.gates):
        given = (call.x, call.residual, None, gates)
        assert_hard(call, call.run(ops(), *given), call.run(reference, *given))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prototypes", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("size", [1, 7, 9, 16])
def test_emitted_gates(size, prototypes, order):
    call = Call((3, 16, size), prototypes, DTYPES[size % 4], ORDERS[order], "balanced")
    for residual in (None, call.residual):
        given = (call.x, residual, call.map.pi, call.alpha, call.beta, call.prototypes)
        assert_same(ops().shared_relu_emit(*given), reference.shared_relu_emit(*given))


@pytest.mark.parametrize("size", [1, 7])
def test_leaders_that_only_partly_lie_together(size):
    """Maps for which some accesses could take neighbours and others could not, or at a wrong boundary."""
    for pi in ([0, 1, 2, 3, 4, 5, 6, 7] * 2, [4, 5, 6, 7, 0, 1, 2, 3] * 2, [*range(8), *reversed(range(8))], [1] * 16):
        call = Call((5, 16, size), 8, torch.float32, ORDERS["channels_last" if size == 1 else "contiguous"], "balanced")
        call.map = ChannelMap(torch.tensor(pi), 8).to(DEVICE)
        for source in (None, call.source):
            given = (call.x, None, source)
            assert_same(call.run(ops(), *given)[:2], call.run(reference, *given)[:2])


def test_two_runs_of_sample_blocks_give_the_same_bits():
    call = Call((70, 16, 7), 3, torch.float32, ORDERS["contiguous"], "random")
    given = (call.x, call.residual)
    assert_same(call.run(ops(), *given), call.run(ops(), *given))


def test_which_kernel_takes_which_shape():
    from deepshare.kernels.triton_tiles import access, takes_columns

    assert takes_columns(Geometry(1024, 64, 1), 64, 4)  # channels last
    assert takes_columns(Geometry(128, 512, 49), 512, 2)  # 7x7 of 16 bits: one by one otherwise
    assert not takes_columns(Geometry(128, 256, 196), 256, 2)  # 14x14 of 16 bits: 8 bytes an access
    assert not takes_columns(Geometry(128, 3, 49), 3, 4)  # a sample block of 147 elements is odd as well
    assert not takes_columns(Geometry(1, 2**27, 49), 2**27, 4)  # beyond 32-bit columns
    assert access(196, itemsize=4) == 4
    assert access(196, itemsize=2) == 4
    assert access(49 * 64, 49 * 6, itemsize=2) == 2


EMPTY = [(0, 9, 4), (2, 9, 0)]


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_input(shape):
    x = torch.empty(shape, device=DEVICE)
    fewer = ChannelMap.balanced(9, 3).to(DEVICE)
    alpha = torch.ones(9, device=DEVICE)
    given = (x, x, fewer.pi, alpha, alpha, 3)
    assert_same(ops().shared_relu_emit(*given), reference.shared_relu_emit(*given))


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_opcheck(order):
    """Schemas and fakes of the raw ops with the optional tensors; opcheck sets deterministic mode itself."""
    torch.use_deterministic_algorithms(False)
    call = Call((3, 16, 7), 3, torch.float32, ORDERS[order], "random")
    for tensor in (call.x, call.residual, call.grad):
        tensor.nan_to_num_()  # opcheck compares with torch.equal
    raw, affine = torch.ops.deepshare, (call.alpha, call.beta)
    leaders = (call.x, call.residual, None, call.gates, call.map.pi)
    maps = (call.map.members, call.map.offsets)
    torch.library.opcheck(raw.shared_relu_triton.default, (*leaders, *affine, None, None))
    torch.library.opcheck(
        raw.shared_relu_emit_triton.default, (call.x, call.residual, call.map.pi, *affine, call.prototypes)
    )
    torch.library.opcheck(raw.shared_relu_backward_triton.default, (call.grad, *leaders, *maps, *affine, None, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 4, 7, 9, 16])
def test_every_combination(size, order, dtype):
    for channels, prototypes in product((9, 16), (1, 3, 8, 9, 16)):
        kind = "balanced" if (channels + prototypes) % 2 else "random"
        call = Call((3, channels, size), prototypes, dtype, ORDERS[order], kind)
        for residual, (source, gates) in product(
            (None, call.residual), ((None, None), (call.source, None), (None, call.gates))
        ):
            given = (call.x, residual, source, gates)
            ours, expected = call.run(ops(), *given), call.run(reference, *given)
            assert memory_order(ours[0]) == memory_order(expected[0])
            if residual is None:
                assert_same(ours[:3], expected[:3])
            else:
                assert_hard(call, ours, expected)
