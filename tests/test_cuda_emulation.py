"""The arithmetic of the CUDA kernels, run on the CPU (emulated_cuda.py), against the reference.

Threads of a block run in rising and in falling order, and both must give the same bits: what is read before the barrier
that makes it valid differs.
"""

import dataclasses
import random

import emulated_cuda
import pytest
import torch
from operator_cases import Case, Inputs, Result, assert_agrees, inputs, random_case, run
from torch import Tensor

from deepshare.kernels import packing, reference
from deepshare.kernels.layout import dense, in_order_of, memory_order

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a call may have besides a Case."""

    residual: bool = False
    bits: bool = False  # the source's gates packed, where all are hard
    offset: bool = False  # every tensor one element off its 16-byte alignment


def random_extras(number: int) -> Extras:
    draw = random.Random(-number)
    return Extras(draw.random() < 0.4, draw.random() < 0.5, draw.random() < 0.2)


def in_both_orders(compute):
    """The tensors that `compute` returns, the same bits for both orders of a block's threads."""
    results = []
    for rising in (1, 0):
        emulated_cuda.library().set_order(rising)
        results.append(compute())
    for first, second in zip(*results, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            assert torch.equal(bits_of(first), bits_of(second)), "the order of a block's threads shows"
    return results[0]


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def emulate(case: Case, given: Inputs, extras: Extras) -> tuple[Result, Inputs]:
    """What the kernels give, and the inputs whose results they must agree with: x + residual in place of x."""
    x = dense(given.x)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    alpha, beta = given.alpha.to(wide), given.beta.to(wide)
    residual = None
    if extras.residual:
        draw = torch.Generator().manual_seed(case.seed + 1)
        values = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
        residual = torch.empty_like(x).copy_(torch.where(values.abs() < 0.2, -x, values))  # some sums are 0
    z = x if residual is None else x + residual
    soft = None if case.is_hard else torch.tensor(case.soft, dtype=torch.int32)
    gamma = None if case.is_hard else torch.tensor(case.gamma, dtype=wide)
    source = None if given.source is None else in_order_of(dense(given.source), x)
    channel_map, offset = given.channel_map, case.dtype.itemsize if extras.offset else 0
    gates = None
    if case.is_hard and extras.bits:
        leader = (z if source is None else source)[:, : channel_map.prototypes]
        gates = packing.pack_bits(torch.empty_like(leader).copy_(leader) >= 0, torch.empty_like(x))
    read = None if gates is not None else source
    maps = (channel_map.pi, channel_map.members, channel_map.offsets)
    emit = channel_map.prototypes if case.is_hard and source is None and gates is None else 0

    def forward():
        operands = (x, residual, read, gates, channel_map.pi, alpha, beta, soft, gamma)
        y, emitted = emulated_cuda.shared_relu(*operands, emit=emit, offset=offset)
        if not emit:
            return y, None
        plain, _ = emulated_cuda.shared_relu(*operands, offset=offset)
        assert torch.equal(bits_of(plain), bits_of(y))
        return y, emitted

    y, emitted = in_both_orders(forward)
    if emit:
        _, expected = reference.shared_relu_emit(x, residual, channel_map.pi, alpha, beta, emit)
        assert torch.equal(emitted, expected), f"{case}: emitted gates"
    dx, dsource, dalpha, dbeta = in_both_orders(
        lambda: emulated_cuda.shared_relu_backward(
            given.grad, x, residual, read, gates, *maps, alpha, beta, soft, gamma, offset=offset
        )
    )
    y, dx = (torch.empty_like(given.x).copy_(t) for t in (y, dx))
    dsource = None if dsource is None else torch.empty_like(source).copy_(dsource)
    affine = [sums.to(given.alpha.dtype) for sums in (dalpha, dbeta)]
    equivalent = torch.empty_like(given.x).copy_(z)
    return Result(y, dx, dsource, *affine), dataclasses.replace(given, x=equivalent, source=source)


def check(case: Case, extras: Extras) -> None:
    given = inputs(case)
    ours, equivalent = emulate(case, given, extras)
    expected = run(case, equivalent, "reference")
    assert_agrees(case, equivalent, ours, expected, truncating=False)


@pytest.mark.parametrize("block", range(10))
def test_random_cases(block: int):
    for number in range(block * 50, block * 50 + 50):
        check(random_case(number, 3000), random_extras(number))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(100))
def test_many_random_cases(block: int):
    for number in range(1000 + block * 100, 1100 + block * 100):
        check(random_case(number), random_extras(number))


# inner 1, 7, 9, 16, 49, 196: rows of whole vectors, of bytes that end within a vector, and of neither; several chunks
SHAPES = [(3, 8, 1, 1), (2, 8, 7, 1), (5, 16, 3, 3), (3, 16, 4, 4), (17, 16, 7, 7), (3, 24, 14, 14), (2, 1, 7, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_networks(shape, layout, dtype):
    channels = shape[1]
    for prototypes in {1, channels, max(1, channels // 3)}:
        for soft in (0, channels):
            case = Case(7, shape, prototypes, "random", dtype, layout, layout, layout, soft=soft)
            check(case, Extras(residual=prototypes == 1))
            check(dataclasses.replace(case, source_channels=prototypes), Extras(bits=prototypes != channels))


def test_sums_over_several_chunks():
    for shape, prototypes in (((40, 3, 16, 16), 2), ((3, 2, 61, 61), 2), ((700, 20, 1, 1), 7), ((70, 8, 7, 7), 3)):
        for soft in (0, shape[1]):
            check(Case(3, shape, prototypes, dtype=torch.float32, soft=soft), Extras())


def test_few_prototypes_of_many_channels():
    for prototypes in (1, 3):
        for layout in ("contiguous", "channels_last"):
            case = Case(5, (2, 520, 4, 4), prototypes, "random", x_layout=layout, grad_layout=layout, soft=400)
            check(case, Extras())
            check(dataclasses.replace(case, source_channels=prototypes), Extras(residual=True))


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 4104), (torch.bfloat16, 4104), (torch.float64, 2051)])
def test_soft_channels_last_beyond_shared_memory(dtype, channels):
    for prototypes in (1, 600):
        case = Case(9, (3, channels), prototypes, "random", dtype, soft=channels - 100)
        check(case, Extras(residual=True))
        check(dataclasses.replace(case, source_channels=prototypes + 1), Extras())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40])
def test_special_values(value: float):
    for dtype in (torch.float32, torch.bfloat16):
        for soft in (0, 2):
            x = torch.full((2, 4, 8), value).to(dtype)
            pi = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
            alpha, beta = torch.tensor([1.0, 0.5, -2.0, 0.0]), torch.tensor([0.0, -0.5, 1.0, 3.0])
            switch = (torch.tensor(soft, dtype=torch.int32), torch.tensor(1.0)) if soft else (None, None)
            operands = (x, None, None, None, pi, alpha, beta, *switch)
            y, _ = emulated_cuda.shared_relu(*operands)
            torch.testing.assert_close(y, reference.shared_relu(*operands), equal_nan=True)


def masked_operands(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x and mask of a random case, dense with samples first."""
    case = random_case(number, 4000)
    given = inputs(case)
    order = [0, *random.Random(number).sample(range(1, len(case.shape)), len(case.shape) - 1)]
    x, grad = (torch.empty_permuted(case.shape, order, dtype=case.dtype).copy_(t) for t in (given.x, given.grad))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    mask = torch.empty_like(x[0], dtype=wide).copy_(torch.rand(case.shape[1:]))
    return grad, x, mask


@pytest.mark.parametrize("block", range(4))
def test_masked_relu(block: int):
    for number in range(block * 25, block * 25 + 25):
        check_masked(*masked_operands(number), offset=number % 4 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(150, 3, 2, 4), (70, 5, 7, 7), (1, 16, 16, 16), (33, 264), (100, 1)])
def test_masked_relu_over_several_chunks(shape, dtype):
    draw = torch.Generator().manual_seed(1)
    grad, x = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    check_masked(grad, x, torch.rand(shape[1:], generator=draw), offset=False)


def check_masked(grad: Tensor, x: Tensor, mask: Tensor, offset: bool) -> None:
    by = x.element_size() if offset else 0
    (y,) = in_both_orders(lambda: (emulated_cuda.masked_relu(x, mask, offset=by),))
    assert torch.equal(bits_of(y), bits_of(reference.masked_relu(x, mask)))
    dx, dmask = in_both_orders(lambda: emulated_cuda.masked_relu_backward(grad, x, mask, offset=by))
    expected_dx, expected_dmask = reference.masked_relu_backward(grad, x, mask)
    assert torch.equal(bits_of(dx), bits_of(expected_dx))
    terms = (grad.double() * x.double()).abs().sum(0)
    bound = terms * 6 * max(x.shape[0], 1) ** 0.5 * torch.finfo(mask.dtype).eps  # operator_cases.bounds, sums
    assert ((dmask.double() - expected_dmask.double()).abs() <= bound).all()


# Odd samples: a vector of two elements reaches from one sample, or pixel, into the next.
ODD_SAMPLES = [(2, 5), (4, 3, 7), (2, 5, 3, 3), (6, 1, 1)]


@pytest.mark.parametrize("number", range(40))
def test_shares_wrap_around(number: int):
    case = random_case(number, 2000)
    check_share(number, case.shape, case.prototypes, memory_order(dense(inputs(case).x)))


@pytest.mark.parametrize("shape", ODD_SAMPLES)
def test_shares_of_odd_samples(shape):
    channels_last = [0, *range(2, len(shape)), 1]
    for number in range(4):
        check_share(number, shape, (shape[1] + 1) // 2, channels_last if number > 1 else list(range(len(shape))))


def check_share(number: int, shape: tuple[int, ...], prototypes: int, order: list[int]) -> None:
    draw, channels = torch.Generator().manual_seed(number), shape[1]

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=draw, dtype=torch.int64)

    def stored(values: Tensor) -> Tensor:
        return torch.empty_permuted(values.shape, order, dtype=values.dtype).copy_(values)

    opened, offset, toggle = (stored(words(*shape)) for _ in range(3))
    scaled = number % 2 == 1
    flip_shape = list(shape)
    flip_shape[1] = prototypes + number % 3 if scaled else channels
    flip = stored(words(*flip_shape))
    alpha, beta, scale = words(channels), words(channels), words(channels) if scaled else None
    gates = packing.pack_bits(torch.rand(shape[0], prototypes, *shape[2:], generator=draw) < 0.5, opened)
    pi = torch.randint(0, prototypes, (channels,), generator=draw).to(torch.int32)
    for party in (0, 1):
        operands = (opened, gates, pi, alpha, beta, flip, scale, offset, toggle, number % 64, party)
        ours = emulated_cuda.shared_relu_share(*operands, offset=8 * (number % 5 == 0))
        assert torch.equal(ours, reference.shared_relu_share(*operands))


# (x, O, kernel, stride, padding, dilation, groups): tiles of 16 and 64 pixels, whole and not, over two samples; sums
# cut among blocks; one thread an output.
RING_CASES = [
    ((1, 3, 5, 4), 9, (3, 2), (1, 1), (1, 0), (1, 1), 1),
    ((2, 5, 8, 7), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 18, 9, 11), 24, (2, 3), (2, 1), (3, 2), (2, 1), 3),
    ((2, 33, 3, 3), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 40, 8, 8), 65, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 6, 9, 9), 6, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    ((1, 4, 6, 6), 14, (1, 1), (3, 2), (0, 0), (1, 1), 2),
    ((1, 300, 1, 1), 10, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


@pytest.mark.parametrize("case", RING_CASES, ids=str)
def test_convolutions_of_words(case):
    shape, out, kernel, stride, padding, dilation, groups = case
    draw = torch.Generator().manual_seed(out)
    x, weight = (
        torch.randint(-(2**63), 2**63 - 1, sizes, generator=draw)
        for sizes in (shape, (out, shape[1] // groups, *kernel))
    )
    expected = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        operands = (given, weight, stride, padding, dilation, groups)
        (ours,) = in_both_orders(lambda operands=operands: (emulated_cuda.ring_conv2d(*operands),))
        assert torch.equal(ours, expected)


def test_division_by_multiplication_is_exact():
    draw, quotient = random.Random(1), emulated_cuda.library().fast_quotient
    divisors = [d + s for d in (1, 3, 7, 49, 2**31, 2**40, 2**62) for s in (-1, 0, 1) if d + s > 0]
    divisors += [draw.randrange(1, 2 ** draw.randrange(1, 63)) for _ in range(200)]
    for divisor in divisors:
        multiples = [divisor * draw.randrange(0, 2**63 // divisor) for _ in range(20)]
        for n in [0, 1, 2**63 - 1, *multiples, *(m - 1 for m in multiples if m), *(m + divisor - 1 for m in multiples)]:
            if n < 2**63:
                assert quotient(n, divisor) == n // divisor, (n, divisor)


def test_a_race_and_a_broken_barrier_are_seen(tmp_path):
    """The emulation itself: threads that wait for ever are reported, and so is what depends on their order."""
    import ctypes
    import subprocess

    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED)
    target = tmp_path / "planted.so"
    emulation = emulated_cuda.EMULATION
    command = ["g++", *emulated_cuda.FLAGS, "-shared", str(source), str(emulation / "emulation.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    planted = ctypes.CDLL(str(target))
    assert planted.sees_a_shuffle_without_all_lanes() == 1
    assert planted.reads_before_barrier(1) != planted.reads_before_barrier(0)
    assert planted.reads_after_barrier(1) == planted.reads_after_barrier(0) == 63


PLANTED = """
#include <stdexcept>
#include "cuda_runtime.h"
static int read_neighbour(bool wait, bool rising) {
  static int value[64];
  int seen = 0;
  for (int& v : value) v = -1;
  emulation::set_order(rising);
  emulation::launch(1, 64, 0, [&] {
    value[threadIdx.x] = threadIdx.x;
    if (wait) __syncthreads();
    if (threadIdx.x == 32) seen = value[63];
  });
  return seen;
}
extern "C" int reads_before_barrier(int rising) { return read_neighbour(false, rising); }
extern "C" int reads_after_barrier(int rising) { return read_neighbour(true, rising); }
extern "C" int sees_a_shuffle_without_all_lanes() {
  try {
    emulation::launch(1, 32, 0, [] { if (threadIdx.x < 31) __shfl_down_sync(0xffffffffu, 1, 1); });
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
"""
