"""masked_relu: against the reference and autograd, both mask forms, numbers at the edges, errors, torch.compile."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from operator_cases import DTYPES, INTERPRETED, LAYOUTS, backend_parameters, device_of, laid_out, truncates
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from deepshare import ChannelMap, masked_relu, shared_relu
from deepshare.raw_ops import IMPLEMENTATIONS, default_backend

BACKENDS = backend_parameters()
NAN, INF = math.nan, math.inf

# [N, C, *S]: one element, short and long samples, one channel, blocks of columns, many short samples, many of a batch
SHAPES = [
    (1, 1),
    (3, 5),
    (2, 3, 7),
    (2, 1, 4, 5),
    (5, 7, 3, 3),
    (1, 6, 33, 16),
    (3, 2, 129, 17),
    (700, 3),
    (301, 2, 7),
    (70, 5, 16, 16),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values, of which one in 16 is 0 and one in 16 is -0.0."""
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 16, shape, generator=generator)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    return wide.masked_fill(zeros == 0, 0.0).masked_fill(zeros == 1, -0.0).to(dtype)


def gradients(x: Tensor, mask: Tensor, grad: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dmask) through the public function."""
    x, mask = x.detach().requires_grad_(), mask.detach().requires_grad_()
    y = masked_relu(x, mask, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, (x, mask), grad))


def dmask_bound(x: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
    """How far two sums of the same n terms in any order may be apart, as in operator_cases.bounds: 6 sqrt(n) eps of the
    sum of |terms| (both sides, lambda = 6), and 2 eps for the products. Per channel both forms subtract the sum over
    open elements from that over all: the terms are then all elements."""
    per_channel = mask.dim() == 1 and x.dim() > 2
    summed = [0, *range(2, x.dim())] if per_channel else [0]
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    terms = (x.double() * grad.double()).abs().sum(summed)
    unit = torch.finfo(mask.dtype).eps  # dmask has the mask's dtype
    rounding = unit if unit > eps else 0.0
    return terms * ((6 * math.sqrt(x.numel() / max(terms.numel(), 1)) + 2) * eps + rounding)


def assert_same_results(ours: tuple, expected: tuple, bound: Tensor, exact: bool = True) -> None:
    """y and dx to the bit (or, where a backend truncates, to the last place), dmask within its bound."""
    for name, got, wanted in zip(("y", "dx"), ours, expected, strict=False):
        assert got.dtype == wanted.dtype
        unit = 0.0 if exact else torch.finfo(got.dtype).eps  # off by one in the last place
        assert ((got.double() - wanted.double()).abs() <= unit * wanted.double().abs()).all(), name
        assert torch.equal(got.signbit(), wanted.signbit()), name
    assert (ours[2].dtype, ours[2].shape) == (expected[2].dtype, expected[2].shape)
    assert ((ours[2].double() - expected[2].double()).abs() <= bound.to(ours[2].device)).all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, dtype: torch.dtype, per_channel: bool):
    draw, device = random.Random(1), device_of(backend)
    slow = backend == "triton" and INTERPRETED
    for number, shape in enumerate(SHAPES):
        for x_layout in draw.sample(LAYOUTS, 1) if slow else LAYOUTS:
            other = draw.choice(LAYOUTS)
            x, grad = (values(shape, dtype, 3 * number + k).to(device) for k in range(2))
            x, grad = laid_out(x, x_layout, draw), laid_out(grad, other, draw)
            mask_dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
            mask = values(shape[1:2] if per_channel else shape[1:], mask_dtype, number).to(device)
            mask = laid_out(mask, draw.choice(["contiguous", "permuted", "sliced", "expanded"]), draw)
            ours, expected = gradients(x, mask, grad, backend), gradients(x, mask, grad, "reference")
            assert_same_results(ours, expected, dmask_bound(x, grad, mask), exact=not truncates(backend, dtype))
            assert ours[0].stride() == ours[1].stride() == torch.empty_like(x).stride()


def composed(x: Tensor, mask: Tensor) -> Tensor:
    """SNL eq. 2 in PyTorch, for autograd to differentiate."""
    wide = mask if mask.dim() == x.dim() - 1 else mask.reshape(-1, *(1,) * (x.dim() - 2))
    return wide * torch.relu(x) + (1 - wide) * x


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (4, 3, 5, 6)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_is_the_equation_and_its_derivative(backend: str, per_channel: bool, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(7)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.randn(shape[1:2] if per_channel else shape[1:], generator=generator, dtype=torch.float64)
    x, grad, mask = (t.to(device_of(backend)) for t in (x, grad, mask))
    leaves = (x.clone().requires_grad_(), mask.clone().requires_grad_())
    y = composed(*leaves)
    expected = (y.detach(), *torch.autograd.grad(y, leaves, grad))
    for got, wanted in zip(gradients(x, mask, grad, backend), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradcheck_away_from_zero(backend: str, per_channel: bool):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn((3, 2, 3, 2), generator=generator, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).to(device_of(backend)).requires_grad_()
    mask = torch.rand((2,) if per_channel else (2, 3, 2), generator=generator, dtype=torch.float64)
    mask = mask.to(device_of(backend)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, mask: masked_relu(x, mask, backend=backend), (x, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_both_mask_forms_agree(backend: str, dtype: torch.dtype):
    """For weights in 0..1, where m + (1 - m) rounds to 1, a mask [C] gives the bits of the same mask as [C, *S]."""
    x, grad = (values((6, 5, 9, 4), dtype, seed).to(device_of(backend)) for seed in (1, 2))
    mask = torch.tensor([0.0, 1.0, 0.1, 0.7, 0.333], device=x.device)
    mask = mask.double() if dtype == torch.float64 else mask
    wide = mask.reshape(5, 1, 1).expand(5, 9, 4)
    short, whole = gradients(x, mask, grad, backend), gradients(x, wide, grad, backend)
    expected = (*whole[:2], whole[2].double().sum((1, 2)).to(mask.dtype))
    assert_same_results(short, expected, dmask_bound(x, grad, mask))
    if not truncates(backend, dtype):
        as_shared = shared_relu(x, ChannelMap.balanced(5, 5).to(x.device), mask, 1 - mask, backend=backend)
        assert torch.equal(short[0], as_shared)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_bool_and_16_bit_masks_are_their_float_values(backend: str, per_channel: bool):
    x = values((3, 4, 5, 5), torch.float32, 1).to(device_of(backend))
    keep = values((4,) if per_channel else (4, 5, 5), torch.float32, 2).to(x.device) > 0
    expected = masked_relu(x, keep.float(), backend=backend)
    for mask in (keep, keep.half(), keep.bfloat16(), keep.double()):
        assert torch.equal(masked_relu(x, mask, backend=backend), expected)
    wide = keep.reshape(4, 1, 1) if per_channel else keep
    assert torch.equal(expected, torch.where(wide, torch.relu(x), x))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_numbers_at_the_edges(backend: str, per_channel: bool):
    """Columns: x, mask, y, dx of g = 1; the documented table."""
    rows = [
        (0.0, 1.0, 0.0, 1.0),
        (-0.0, 1.0, -0.0, 1.0),
        (-2.0, 1.0, -0.0, 0.0),
        (-2.0, 0.0, -2.0, 1.0),
        (-2.0, 0.25, -1.5, 0.75),
        (3.0, 1.0, 3.0, 1.0),
        (INF, 1.0, INF, 1.0),
        (-INF, 0.0, -INF, 1.0),
        (-INF, 1.0, NAN, 0.0),
        (NAN, 0.0, NAN, 1.0),
        (NAN, 1.0, NAN, 0.0),
        (1e-45, 1.0, 1e-45, 1.0),
        (-1e-45, 0.0, -1e-45, 1.0),
    ]
    x, mask, y, dx = torch.tensor(rows, device=device_of(backend)).unbind(1)
    shape = (1, len(rows), 1) if per_channel else (1, 1, len(rows))
    got = gradients(
        x.reshape(shape), mask if per_channel else mask.reshape(shape[1:]), torch.ones(shape).to(x), backend
    )
    for name, ours, expected in zip(("y", "dx"), got, (y, dx), strict=False):
        torch.testing.assert_close(ours.flatten(), expected, rtol=0, atol=0, equal_nan=True, msg=name)
        known = ~expected.isnan()
        assert torch.equal(ours.flatten()[known].signbit(), expected[known].signbit()), name
    if not per_channel:  # the channel form computes these as a difference of sums, inf - inf
        dmask = torch.where(x >= 0, 0.0, -x)
        torch.testing.assert_close(got[2].flatten(), dmask, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_flows_through_an_open_gate_into_the_mask(backend: str):
    """Even where g * x is not finite."""
    x = torch.tensor([[[INF, 1.0, 3.0]]], device=device_of(backend))
    grad = torch.tensor([[[1.0, INF, NAN]]], device=x.device)
    assert gradients(x, torch.full_like(x[0], 0.5), grad, backend)[2].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 3), (0, 3)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_tensors(backend: str, per_channel: bool, shape: tuple[int, ...]):
    x = torch.ones(shape, device=device_of(backend))
    mask = torch.ones(shape[1:2] if per_channel else shape[1:], device=x.device)
    y, dx, dmask = gradients(x, mask, torch.ones_like(x), backend)
    assert y.shape == dx.shape == shape
    assert torch.equal(dmask, torch.zeros_like(mask))


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
def test_bits_do_not_depend_on_the_number_of_threads(backend: str):
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for shape in [(600, 7), (70, 3, 40, 40), (2, 5, 129, 65)]:
            x, grad = (values(shape, torch.bfloat16, seed) for seed in (1, 2))
            results.append(gradients(x, values(shape[1:], torch.float32, 3), grad, backend))
    torch.set_num_threads(threads)
    for first, *others in zip(results[:3], results[3:6], results[6:], strict=True):
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


BAD = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor (got list)"),
    "mask no tensor": ({"mask": 1.0}, TypeError, "mask must be a tensor (got float)"),
    "x integer": (
        {"x": torch.ones(2, 4, 3, dtype=torch.int32)},
        TypeError,
        "x must be float32, float16, bfloat16 or float64 (got torch.int32)",
    ),
    "mask integer": (
        {"mask": torch.ones(4, 3, dtype=torch.int64)},
        TypeError,
        "mask must be floating point or bool (got torch.int64)",
    ),
    "x vector": (
        {"x": torch.ones(4), "mask": torch.ones(4)},
        ValueError,
        "x must be [N, C, *S] and mask [C, *S] or [C] (got [4] and [4])",
    ),
    "mask of other size": (
        {"mask": torch.ones(4, 2)},
        ValueError,
        "x must be [N, C, *S] and mask [C, *S] or [C] (got [2, 4, 3] and [4, 2])",
    ),
    "mask of other channels": ({"mask": torch.ones(3)}, ValueError, "(got [2, 4, 3] and [3])"),
    "mask with a batch": ({"mask": torch.ones(2, 4, 3)}, ValueError, "(got [2, 4, 3] and [2, 4, 3])"),
    "mask that would broadcast": ({"mask": torch.ones(4, 1)}, ValueError, "(got [2, 4, 3] and [4, 1])"),
    "mask device": (
        {"mask": torch.ones(4, 3, device="meta")},
        ValueError,
        "mask must be on x's device cpu (got meta)",
    ),
    "backend unknown": (
        {"backend": "opencl"},
        ValueError,
        "backend must be one of reference, cpu, triton, cuda (got 'opencl')",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        masked_relu(**{"x": torch.ones(2, 4, 3), "mask": torch.ones(4, 3), **changes})
    assert str(caught.value).startswith("masked_relu: ")


def test_a_second_derivative_is_refused():
    x, mask = torch.ones(2, 3, requires_grad=True), torch.ones(3)
    (dx,) = torch.autograd.grad(masked_relu(x, mask).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_mask_first_used_in_inference_mode_trains():
    x, mask = torch.randn(2, 3, 4), torch.rand(3)
    with torch.inference_mode():
        masked_relu(x, mask)
    assert gradients(x, mask, torch.ones_like(x))[2].shape == (3,)


def test_the_python_of_the_contract_runs():
    page = Path(__file__).resolve().parents[1] / "docs/masked_relu.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(block, {})


@pytest.fixture
def fresh_dynamo():
    """opcheck and Inductor set deterministic mode and compare it themselves; here it stays off."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, layout: str, fresh_dynamo):
    draw = random.Random(3)
    x, grad = (laid_out(values((2, 6, 3, 5), torch.float32, k), layout, draw).to(device_of(backend)) for k in (1, 2))
    mask = values((6, 3, 5), torch.float32, 3).to(x.device)
    run = IMPLEMENTATIONS[backend]
    torch.library.opcheck(run["masked_relu"], (x, mask))
    torch.library.opcheck(run["masked_relu_backward"], (grad, x, mask))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_whole(backend: str, per_channel: bool, layout: str, fresh_dynamo):
    draw, device = random.Random(4), device_of(backend)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(x: Tensor, mask: Tensor) -> Tensor:
        return masked_relu(x, mask, backend=backend)

    mask = values((6,) if per_channel else (6, 3, 5), torch.float32, 3).to(device).requires_grad_()
    for _ in range(2):
        x = laid_out(values((2, 6, 3, 5), torch.float32, 1).to(device), layout, draw).requires_grad_()
        y, expected = call(x, mask), masked_relu(x, mask, backend=backend)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        grads = (torch.autograd.grad(result, (x, mask), torch.ones_like(y)) for result in (y, expected))
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


@pytest.mark.skipif(default_backend("cpu") == "reference", reason="the native part is not built")
def test_the_compiled_kernels_are_the_default():
    x, mask = torch.randn(3, 4, 5), torch.rand(4, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        masked_relu(x, mask)
    assert "deepshare::masked_relu_native" in {event.key for event in seen.key_averages()}
