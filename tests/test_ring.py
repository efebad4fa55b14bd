"""ring_conv2d and ring_linear: exact in Z_2^64 against Python's integers, and against torch's int64 convolution."""

import random
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from operator_cases import LAYOUTS, backend_parameters, device_of, laid_out
from test_native import NATIVE, in_fresh_process
from torch import Tensor
from torch.nn import functional

from deepshare import pack_weight, ring_conv2d, ring_linear
from deepshare.kernels import native, ring_reference
from deepshare.raw_ops import choose_backend

BACKENDS = [parameter for parameter in backend_parameters() if parameter.values[0] != "triton"]
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}
EXTREMES = (-(2**63), 2**63 - 1, -1, 0, 1, 2**62, 2**31, -(2**31) - 1, 2**32 - 1, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Conv:
    """One convolution; `bits` of the weight's values."""

    x: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    settings: dict = field(default_factory=dict)
    bits: int = 64

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        shape = (self.out, self.x[1] // self.settings.get("groups", 1), *self.kernel)
        return words(self.x, draw), words(shape, draw, self.bits)


def words(shape: tuple[int, ...], draw: torch.Generator, bits: int = 64) -> Tensor:
    """Uniform signed values of so many bits, of which one in 8 is extreme."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = torch.randint(least, most, shape, generator=draw)
    extremes = torch.tensor([value for value in EXTREMES if least <= value <= most])
    special = extremes[torch.randint(0, len(extremes), shape, generator=draw)]
    return torch.where(torch.randint(0, 8, shape, generator=draw) == 0, special, values)


SMALL = [
    Conv((1, 1, 1, 1), 1, (1, 1)),
    Conv((2, 3, 5, 6), 4, (3, 2), {"padding": 1}),
    Conv((1, 4, 5, 4), 6, (2, 3), {"groups": 2, "stride": (2, 1), "padding": (0, 2)}),
    Conv((1, 3, 4, 7), 3, (3, 3), {"groups": 3, "dilation": (1, 2), "padding": 2}),
    Conv((2, 2, 6, 6), 9, (2, 2), {"stride": 3, "dilation": 3, "padding": 1}, bits=32),
]


def by_python(x: Tensor, weight: Tensor, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """The equation on Python's integers."""
    (sh, sw), (ph, pw), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    padded = np.zeros((*x.shape[:2], x.shape[2] + 2 * ph, x.shape[3] + 2 * pw), dtype=object)
    padded[:, :, ph : ph + x.shape[2], pw : pw + x.shape[3]] = x.numpy().astype(object)
    filters, (out, deep, kh, kw) = weight.numpy().astype(object), weight.shape
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((x.shape[0], out, height, width), dtype=object)
    for n, o, i, j in np.ndindex(y.shape):
        first = o // (out // groups) * deep
        rows, columns = slice(sh * i, sh * i + dh * (kh - 1) + 1, dh), slice(sw * j, sw * j + dw * (kw - 1) + 1, dw)
        total = (padded[n, first : first + deep, rows, columns] * filters[o]).sum()
        y[n, o, i, j] = (int(total) + 2**63) % 2**64 - 2**63
    return torch.from_numpy(y.astype(np.int64))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_small_convolutions_equal_pythons_integers(backend: str, case: Conv):
    x, weight = case.tensors()
    expected = by_python(x, weight, **case.settings)
    for given in forms(weight, case, device_of(backend)):
        got = ring_conv2d(x.to(device_of(backend)), given, **case.settings, backend=backend)
        assert torch.equal(got.cpu(), expected)


def forms(weight: Tensor, case: Conv, device: str) -> list:
    """The weight as it is and packed."""
    moved = weight.to(device)
    return [moved, pack_weight(moved, case.settings.get("groups", 1))]


# The native kernels' paths: panels whole and not, few channels a group, pixels in fours, twos and ones, long sums.
LARGER = [
    Conv((1, 64, 32, 32), 64, (3, 3), {"padding": 1}, bits=32),
    Conv((2, 33, 9, 7), 41, (3, 3), {"padding": 2}),
    Conv((1, 3, 33, 31), 40, (7, 7), {"stride": 2, "padding": 3}, bits=32),
    Conv((3, 129, 1, 1), 33, (1, 1)),
    Conv((1, 40, 13, 13), 72, (1, 1), {"stride": 2}, bits=32),
    Conv((5, 96, 2, 2), 24, (3, 3), {"padding": 1}, bits=32),
    Conv((1, 300, 4, 4), 48, (3, 3), {"padding": 1}),
    Conv((2, 24, 10, 11), 24, (3, 3), {"groups": 24, "padding": 1}, bits=32),
    Conv((1, 16, 9, 9), 48, (5, 3), {"groups": 16, "stride": (2, 3), "padding": (4, 1)}),
    Conv((2, 20, 8, 8), 30, (3, 3), {"groups": 5, "padding": 3, "dilation": 2}, bits=32),
    Conv((1, 12, 17, 5), 64, (4, 2), {"groups": 4, "stride": (3, 1), "dilation": (2, 3), "padding": (5, 4)}),
    Conv((1, 7, 40, 1), 13, (5, 1), {"stride": 2, "padding": (2, 0)}),
    Conv((7, 6, 3, 3), 8, (3, 3)),
    Conv((1, 5, 4, 300), 40, (3, 3), {"padding": 1}, bits=32),
]


@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_convolutions_equal_torchs(backend: str, case: Conv):
    x, weight = case.tensors()
    expected = functional.conv2d(x, weight, **case.settings)
    for given in forms(weight, case, device_of(backend)):
        got = ring_conv2d(x.to(device_of(backend)), given, **case.settings, backend=backend)
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), expected)


def random_conv(number: int) -> Conv:
    draw = random.Random(number)

    def one_or_two(*choices: int):
        return draw.choice(choices) if draw.random() < 0.5 else (draw.choice(choices), draw.choice(choices))

    groups = draw.choice([1, 1, 1, 2, 3, 8])
    deep, per_group = draw.choice([1, 2, 3, 5, 16]), draw.choice([1, 2, 3, 4, 7, 8, 9, 24, 33])
    settings = {
        "stride": one_or_two(1, 1, 2, 3),
        "padding": one_or_two(0, 1, 2, 5),
        "dilation": one_or_two(1, 1, 2),
        "groups": groups,
    }
    shape = (draw.choice([1, 1, 2, 5]), groups * deep, draw.randint(5, 14), draw.randint(5, 20))
    kernel = (draw.choice([1, 2, 3]), draw.choice([1, 2, 3]))
    return Conv(shape, groups * per_group, kernel, settings, draw.choice([32, 64]))


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_convolutions_in_every_layout(backend: str, block: int):
    for number in range(40 * block, 40 * block + 40):
        case, draw = random_conv(number), random.Random(number)
        x, weight = case.tensors(number)
        x, weight = laid_out(x, draw.choice(LAYOUTS), draw), laid_out(weight, draw.choice(LAYOUTS), draw)
        expected = functional.conv2d(x, weight, **case.settings)
        for given in forms(weight, case, device_of(backend)):
            got = ring_conv2d(x.to(device_of(backend)), given, **case.settings, backend=backend)
            assert torch.equal(got.cpu(), expected), case


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("batch", "deep", "out"), [(1, 1, 1), (1, 512, 100), (3, 77, 9), (65, 40, 3), (2, 4, 257)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_matrix_products(backend: str, batch: int, deep: int, out: int, bits: int):
    draw = torch.Generator().manual_seed(deep)
    x, weight = words((batch, deep), draw), words((deep, out), draw, bits)
    expected = torch.from_numpy(x.numpy() @ weight.numpy())
    device = device_of(backend)
    for given in (weight.to(device), weight.t().contiguous().t().to(device), pack_weight(weight.to(device))):
        assert torch.equal(ring_linear(x.to(device), given, backend=backend).cpu(), expected)
    turned = x.t().contiguous().t().to(device)
    assert torch.equal(ring_linear(turned, weight.to(device), backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_add_or_to_give(backend: str):
    device = device_of(backend)

    def conv(x: tuple[int, ...], weight: tuple[int, ...], **settings: int) -> Tensor:
        tensors = [torch.ones(shape, dtype=torch.int64, device=device) for shape in (x, weight)]
        results = [ring_conv2d(tensors[0], given, backend=backend, **settings)
                   for given in (tensors[1], pack_weight(tensors[1], settings.get("groups", 1)))]  # fmt: skip
        assert torch.equal(*results)
        return results[0].cpu()

    assert conv((0, 8, 5, 5), (9, 8, 3, 3), padding=1).shape == (0, 9, 5, 5)
    assert conv((2, 8, 5, 5), (0, 8, 3, 3)).shape == (2, 0, 3, 3)
    assert torch.equal(conv((2, 0, 5, 4), (6, 0, 3, 3)), torch.zeros(2, 6, 3, 2, dtype=torch.int64))
    assert torch.equal(conv((1, 8, 0, 2), (8, 1, 3, 3), padding=3, groups=8), torch.zeros(1, 8, 4, 6).long())
    assert ring_linear(torch.ones(0, 3).long().to(device), torch.ones(3, 2).long().to(device)).shape == (0, 2)
    assert ring_linear(torch.ones(2, 0).long().to(device), torch.ones(0, 2).long().to(device)).tolist() == [[0, 0]] * 2


@NATIVE
def test_the_number_of_threads_does_not_show():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([convolved(case) for case in LARGER])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def convolved(case: Conv) -> Tensor:
    x, weight = case.tensors()
    return ring_conv2d(x, pack_weight(weight, case.settings.get("groups", 1)), **case.settings, backend="cpu")


def all_right() -> bool:
    """Whether this process's library computes every case above as torch does, its weight plain and packed."""
    for case in [*SMALL, *LARGER, *map(random_conv, range(60))]:
        x, weight = case.tensors()
        expected = functional.conv2d(x, weight, **case.settings)
        for given in forms(weight, case, "cpu"):
            if not torch.equal(ring_conv2d(x, given, **case.settings, backend="cpu"), expected):
                return False
    return True


@NATIVE
def test_every_instruction_set_gives_the_same_bits():
    builds = ["baseline", "x86_64_v3", "x86_64_v4"]
    own = native.load().build_info()["cpu_kernels"]
    assert all_right()
    for narrower in builds[: builds.index(own)]:
        code = "import test_ring as t; print(t.native.load().build_info()['cpu_kernels'], t.all_right())"
        assert in_fresh_process(code, DEEPSHARE_CPU_ISA=narrower) == [f"{narrower} True"]


@pytest.mark.parametrize("case", [*SMALL, *LARGER[1:6], *LARGER[8:]], ids=str)
def test_products_of_16_bit_limbs_are_exact(case: Conv, monkeypatch: pytest.MonkeyPatch):
    """What the reference does on a GPU; sums longer than LONGEST_SUM are cut, here already at 7."""
    x, weight = case.tensors()
    arguments = [(v, v) if isinstance(v, int) else v for v in (case.settings.get(n, d) for n, d in DEFAULTS.items())]
    expected = functional.conv2d(x, weight, **case.settings)
    for longest in (ring_reference.LONGEST_SUM, 7):
        monkeypatch.setattr(ring_reference, "LONGEST_SUM", longest)
        got = ring_reference.ring_conv2d_limbs(x, weight, *arguments, case.settings.get("groups", 1))
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL, *LARGER], ids=str)
def test_the_reference_on_a_gpu_is_exact(case: Conv):
    x, weight = case.tensors()
    got = ring_conv2d(x.cuda(), weight.cuda(), **case.settings, backend="reference")
    assert torch.equal(got.cpu(), functional.conv2d(x, weight, **case.settings))


def test_the_longest_sum_of_limbs_is_exact_and_no_longer_one():
    longest, limb = ring_reference.LONGEST_SUM, (1 << ring_reference.LIMB_BITS) - 1
    assert longest * limb**2 < 2**53 <= 2 * longest * limb**2
    ones = torch.full((1, 1, 1, longest), -1)  # every limb at its largest
    got = ring_reference.ring_conv2d_limbs(ones, torch.full((1, 1, 1, longest), -1), (1, 1), (0, 0), (1, 1), 1)
    assert got.item() == longest


def test_a_packed_weight_knows_whether_32_bits_hold_it():
    small = torch.tensor([-(2**31), 2**31 - 1, 0, 5]).reshape(4, 1, 1, 1)
    for weight, narrow in ((small, True), (small + 1, False), (small - 1, False)):
        kept = pack_weight(weight)
        assert kept.narrow == narrow
        assert torch.equal(kept.weight, weight)
    assert pack_weight(small.expand(4, 3, 3, 3)).packed.shape == (1, 1, 27, 32)
    assert pack_weight(small, groups=4).packed is None  # depthwise: taken as it is
    weight = small.clone()
    kept = pack_weight(weight)
    weight.zero_()
    assert torch.equal(kept.weight, small)


def test_an_op_that_a_backend_lacks_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepshare.raw_ops._lacks", lambda op, name, device: name == "cpu")
    assert choose_backend("ring_conv2d", None, "cpu") == "reference"
    monkeypatch.setattr("deepshare.raw_ops.backends", lambda: {"reference": None, "cpu": None})
    with pytest.raises(RuntimeError, match="ring_linear: backend 'cpu' has no ring_conv2d here"):
        ring_linear(torch.ones(1, 1).long(), torch.ones(1, 1).long(), backend="cpu")


@pytest.mark.parametrize("case", [*SMALL, *LARGER[:4]], ids=str)
def test_the_meta_device_gives_the_shape(case: Conv):
    x, weight = case.tensors()
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (case.settings.get(n, d) for n, d in DEFAULTS.items())]
    geometry = [number for pair in pairs for number in pair]
    groups = case.settings.get("groups", 1)
    got = torch.ops.deepshare.ring_conv2d_native(x.to("meta"), weight.to("meta"), None, None, *geometry, groups)
    assert got.shape == functional.conv2d(x, weight, **case.settings).shape


X, W = torch.ones(2, 4, 5, 5).long(), torch.ones(6, 2, 3, 3).long()
WRONG = [
    (lambda: ring_conv2d(X.float(), W, groups=2), TypeError,
     "ring_conv2d: x must be an int64 tensor (got torch.float32)"),
    (lambda: ring_conv2d([1], W), TypeError, "ring_conv2d: x must be an int64 tensor (got list)"),
    (lambda: ring_conv2d(X, W.int()), TypeError,
     "ring_conv2d: weight must be an int64 tensor or a PackedWeight (got torch.int32)"),
    (lambda: ring_conv2d(X[0], W, groups=2), ValueError,
     "ring_conv2d: x must be [N, C, H, W] and weight [O, C/groups, kh, kw] (got [4, 5, 5] and [6, 2, 3, 3])"),
    (lambda: ring_conv2d(X, W), ValueError, "ring_conv2d: groups must divide C and O, and weight must have C / groups "
     "channels (got 1 groups, x [2, 4, 5, 5], weight [6, 2, 3, 3])"),
    (lambda: ring_conv2d(X, W[:5], groups=2), ValueError, "weight [5, 2, 3, 3])"),
    (lambda: ring_conv2d(X, W, groups=0), ValueError, "ring_conv2d: groups must be an int, at least 1 (got 0)"),
    (lambda: ring_conv2d(X, W, groups=2, stride=0), ValueError,
     "ring_conv2d: stride must be an int or two, at least 1 (got 0)"),
    (lambda: ring_conv2d(X, W, groups=2, padding=(1, -1)), ValueError,
     "ring_conv2d: padding must be an int or two, at least 0 (got (1, -1))"),
    (lambda: ring_conv2d(X, W, groups=2, dilation=(1, 1, 1)), ValueError, "dilation must be an int or two"),
    (lambda: ring_conv2d(X, W, groups=2, stride=1.0), ValueError, "stride must be an int or two"),
    (lambda: ring_conv2d(X[..., :1], W, groups=2), ValueError,
     "ring_conv2d: x must be at least 3 high and wide with its padding, as weight is (got 1 + 2 * 0)"),
    (lambda: ring_conv2d(X.to("meta"), W, groups=2), ValueError,
     "ring_conv2d: weight must be on x's device meta (got cpu)"),
    (lambda: ring_conv2d(X, pack_weight(W, 2)), ValueError,
     "ring_conv2d: groups must be 2, for which weight was packed (got 1)"),
    (lambda: ring_conv2d(X, pack_weight(W[0, 0])), ValueError,
     "ring_conv2d: weight must be of a convolution (got one packed for ring_linear)"),
    (lambda: ring_linear(X[0, 0], pack_weight(W)), ValueError,
     "ring_linear: weight must be a matrix [K, O] (got one packed for ring_conv2d)"),
    (lambda: ring_linear(X[0, 0], X[0, 0, :3]), ValueError,
     "ring_linear: x must be [N, K] and weight [K, O] (got [5, 5] and [3, 5])"),
    (lambda: ring_linear(X[0, 0], X[0, 0], backend="gpu"), ValueError, "ring_linear: backend must be one of"),
    (lambda: pack_weight(W[0]), ValueError,
     "pack_weight: weight must be [O, C/groups, kh, kw] or [K, O] (got [2, 3, 3])"),
    (lambda: pack_weight(W.float()), TypeError, "pack_weight: weight must be an int64 tensor (got torch.float32)"),
    (lambda: pack_weight(W, 4), ValueError, "pack_weight: groups must divide O = 6 (got 4)"),
    (lambda: pack_weight(W[0, 0], 3), ValueError, "pack_weight: groups must be 1 for a matrix (got 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_name_the_argument(call, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        call()
