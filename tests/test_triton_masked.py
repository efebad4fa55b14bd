"""masked_relu and shared_relu_share in Triton against the reference: tiles and chunks at their edges, every order."""

import math

import pytest
import torch
from interpreter import round_to_nearest
from operator_cases import INTERPRETED, backend_parameters, device_of
from torch import Tensor

from deepshare.kernels import reference
from deepshare.kernels.packing import pack_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 3, 7), (9, 8, 4), (2, 1, 33), (17, 5, 1), (1, 2, 3)]
ORDERS = {"contiguous": (0, 1, 2), "channels_last": (0, 2, 1), "samples_within": (2, 0, 1), "samples_last": (1, 2, 0)}
DEVICE = device_of("triton")
pytestmark = [mark for parameter in backend_parameters() if parameter.values == ("triton",) for mark in parameter.marks]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        round_to_nearest(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 elements in 8 columns, chunks of one or a few of them."""
    if not INTERPRETED:
        pytest.skip("tiles of 16 elements are for the interpreter; a GPU runs the launched sizes")
    from deepshare.kernels import triton_masked, triton_tiles

    for name, value in {"TILE_BYTES": 64, "BACKWARD_TILE": 16, "BACKWARD_TILE_DOUBLE": 8, "COLUMNS": 8}.items():
        monkeypatch.setattr(triton_tiles, name, value)
    monkeypatch.setattr(triton_masked, "WANTED_BLOCKS", 4)


def ops():
    from deepshare.kernels import triton_ops

    return triton_ops


def stored(values: Tensor, order: tuple[int, ...]) -> Tensor:
    return values.permute(order).contiguous().permute([order.index(d) for d in range(len(order))]).to(DEVICE)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...], seed: int) -> Tensor:
    """Small integers, -0.0 among them, so that every sum is exact: one lost or doubled term shows."""
    generator = torch.Generator().manual_seed(seed)
    return stored(torch.randint(-4, 5, shape, generator=generator).to(torch.float64).mul(-1).to(dtype), order)


def masks(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """A mask of halves and quarters in two orders."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.arange(math.prod(shape[1:]), dtype=wide, device=DEVICE).remainder(5).div(4).reshape(shape[1:])
    return [values, values.t().contiguous().t()]


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_relu(small_tiles, shape, order, dtype):
    x, grad = (drawn(shape, dtype, ORDERS[order], seed) for seed in (1, 2))
    for mask in masks(shape, dtype):
        assert_same(ops().masked_relu(x, mask), reference.masked_relu(x, mask))
        ours, expected = (module.masked_relu_backward(grad, x, mask) for module in (ops(), reference))
        for got, wanted in zip(ours, expected, strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("name", ["sliced", "expanded", "nan"])
def test_masked_relu_of_other_strides_and_values(name):
    shape = (6, 4, 9)
    x, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(DEVICE) for s in (3, 4))
    if name == "sliced":
        x, grad = x.repeat(1, 1, 2)[..., ::2], grad.transpose(0, 2).contiguous().transpose(0, 2)
    elif name == "expanded":
        grad = grad[:1].expand(shape)
    else:
        x[1, 2, 3], grad[2, 3, 4] = math.nan, math.inf
    mask = torch.rand(shape[1:], device=DEVICE)
    assert_same(ops().masked_relu(x, mask), reference.masked_relu(x, mask))
    (dx, dmask), (wanted_dx, wanted_dmask) = (m.masked_relu_backward(grad, x, mask) for m in (ops(), reference))
    assert_same(dx, wanted_dx)
    # 6 terms added in another order, each rounded once
    bound = 6 * torch.finfo(torch.float32).eps * (x * grad).nan_to_num(posinf=0, neginf=0).abs().sum(0)
    assert torch.equal(dmask.isfinite(), wanted_dmask.isfinite())
    assert ((dmask - wanted_dmask).abs() <= bound).logical_or(~dmask.isfinite()).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty_input(shape):
    x, mask = torch.empty(shape, device=DEVICE), torch.ones(shape[1:], device=DEVICE)
    assert ops().masked_relu(x, mask).shape == shape
    dx, dmask = ops().masked_relu_backward(x, x, mask)
    assert (dx.shape, dmask.shape) == (shape, shape[1:])
    assert not dmask.any()


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


@pytest.mark.parametrize("prototypes", [1, 3, 8, 9])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 16, 7), (3, 9, 1), (1, 9, 16)])
def test_share(shape, order, prototypes):
    opened, flip, offset, toggle = (stored(integers(shape, seed), ORDERS[order]) for seed in range(4))
    alpha, beta, scale = (integers(shape[1:2], seed).to(DEVICE) for seed in (4, 5, 6))
    pi = torch.randint(0, prototypes, shape[1:2], generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    wider = stored(integers((shape[0], prototypes + 1, shape[2]), 8), ORDERS[order])
    gates = pack_bits(stored(integers(shape, 9) < 0, ORDERS[order])[:, :prototypes], torch.empty_like(opened))
    for shift, party in [(0, 0), (16, 0), (16, 1), (63, 1)]:
        for factors in ((flip, None), (wider, scale)):
            given = (opened, gates, pi.to(DEVICE), alpha, beta, *factors, offset, toggle, shift, party)
            assert_same(ops().shared_relu_share(*given), reference.shared_relu_share(*given))


def test_share_of_other_strides_and_of_nothing():
    shape = (2, 9, 8)
    opened, flip, offset, toggle = (stored(integers(shape, seed), order) for seed, order in
                                    enumerate([(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)]))  # fmt: skip
    alpha, pi = integers((9,), 5).to(DEVICE), torch.arange(9, dtype=torch.int32, device=DEVICE)
    gates = pack_bits(opened < 0, opened)
    given = (opened[:, :, ::1], gates, pi, alpha, alpha, flip, None, offset[:1].expand(shape), toggle, 3, 1)
    assert_same(ops().shared_relu_share(*given), reference.shared_relu_share(*given))
    nothing = opened[:0]
    given = (nothing, gates[:0], pi, alpha, alpha, nothing, None, nothing, nothing, 3, 1)
    assert ops().shared_relu_share(*given).shape == (0, 9, 8)


def test_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck sets it itself
    shape = (3, 8, 7)
    x, grad = drawn(shape, torch.float32, (0, 2, 1), 1), drawn(shape, torch.float32, (0, 1, 2), 2)
    mask = masks(shape, torch.float32)[1]
    raw = torch.ops.deepshare
    torch.library.opcheck(raw.masked_relu_triton.default, (x, mask))
    torch.library.opcheck(raw.masked_relu_backward_triton.default, (grad, x, mask))
    opened, alpha = stored(integers(shape, 1), (0, 2, 1)), integers((8,), 2).to(DEVICE)
    gates, pi = pack_bits(opened < 0, opened), torch.arange(8, dtype=torch.int32, device=DEVICE)
    given = (opened, gates, pi, alpha, alpha, opened, alpha, opened, opened, 16, 1)
    torch.library.opcheck(raw.shared_relu_share_triton.default, given)
