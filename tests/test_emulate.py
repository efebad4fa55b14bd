"""The emulation against plain Python integers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from emulate_cases import CASES, ROUNDINGS, case, program_of, signed, words
from secure_cases import UNIT, bounds

from deepshare.secure.emulate import (
    compared,
    emulate,
    gate_makers,
    truncate,
)
from deepshare.secure.exactness import run_gates
from deepshare.secure.fixed_point import decode
from deepshare.secure.program import Step


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    ],
)
def test_convolution_wraps_around_as_python_integers_do(options):
    image, weight, bias = (
        words(1, 4, 5, 4, seed=0),
        words(2, 4 // options["groups"], 2, 2, seed=1),
        words(2, 1, 1, seed=2),
    )
    shape = tuple(F.conv2d(image.double(), weight.double(), **options).shape[1:])
    steps = (
        Step("input", "x", (), (4, 5, 4)),
        Step("conv2d", "conv", (0,), shape, params={"weight": "w", "bias": "b"}, options=options),
    )
    program = program_of(*steps, w=(tuple(weight.shape), 16), b=((2, 1, 1), 32))
    result = emulate(program, {"w": weight, "b": bias}, image).result
    (down, right), (top, left), (tall, wide) = options["stride"], options["padding"], options["dilation"]
    inputs = 4 // options["groups"]
    for o, row, column in itertools.product(*map(range, shape)):
        total = int(bias[o])
        for i, j, k in itertools.product(range(inputs), range(2), range(2)):
            y, x = row * down + j * tall - top, column * right + k * wide - left
            if 0 <= y < 5 and 0 <= x < 4:
                channel = o // (2 // options["groups"]) * inputs + i
                total += int(image[0, channel, y, x]) * int(weight[o, i, j, k])
        assert int(result[0, o, row, column]) == signed(total) >> 16


@pytest.mark.parametrize("op", ["linear", "affine", "shared"])
def test_products_wrap_around_as_python_integers_do(op):
    x, w, b = words(2, 3, seed=3), words(3, seed=4), words(3, seed=5)
    roles = {"linear": ("weight", "bias"), "affine": ("scale", "shift"), "shared": ("alpha", "beta")}[op]
    weight = torch.diag(w) if op == "linear" else w
    step = Step(
        op,
        op,
        (0,),
        (3,),
        params=dict(zip(roles, "wb", strict=True)),
        public={"pi": "pi"} if op == "shared" else {},
        gates=(0, 3) if op == "shared" else None,
        fresh=op == "shared",
    )
    public = {"pi": torch.tensor([2, 1, 0])} if op == "shared" else {}
    program = program_of(Step("input", "x", (), (3,)), step, public=public, w=(tuple(weight.shape), 16), b=((3,), 32))
    result = emulate(program, {"w": weight, "b": b}, x).result
    for n, c in itertools.product(range(2), range(3)):
        value, scale, shift = int(x[n, c]), int(w[c]), int(b[c])
        total = value * scale + shift if op != "shared" else value * (scale * (int(x[n, 2 - c]) >= 0) + shift)
        assert int(result[n, c]) == signed(total) >> 16


@pytest.mark.parametrize(
    ("kernel", "factor", "bits"),
    [((2, 2), 1, 2), ((4, 2), 1, 3), ((1, 1), 1, 0), ((3, 1), 21845, 16), ((3, 2), 10923, 16)],
)
def test_average_pooling_sums_then_divides(kernel, factor, bits):
    x = words(2, 2, 5, 4, seed=6, magnitude=2**40)
    out = (5 + 2 - kernel[0]) // 2 + 1, 4 - kernel[1] + 1
    options = {"kernel": kernel, "stride": (2, 1), "padding": (1, 0)}
    program = program_of(Step("input", "x", (), (2, 5, 4)), Step("avg_pool2d", "p", (0,), (2, *out), options=options))
    result = emulate(program, {}, x).result
    for n, c, row, column in itertools.product(range(2), range(2), *map(range, out)):
        rows = [2 * row + i - 1 for i in range(kernel[0]) if 0 <= 2 * row + i - 1 < 5]
        total = sum(int(x[n, c, y, column + j]) for y in rows for j in range(kernel[1]))
        assert int(result[n, c, row, column]) == signed(total * factor) >> bits


def test_steps_that_move_or_add_elements():
    x = words(2, 4, 2, 3, seed=7)
    steps = (
        Step("input", "x", (), (4, 2, 3)),
        Step("narrow", "n", (0,), (2, 2, 3), options={"start": 1, "length": 2}),
        Step("gather", "g", (0,), (2, 2, 3), public={"index": "i"}),
        Step("sub", "s", (1, 2), (2, 2, 3)),
        Step("add", "a", (3, 1), (2, 2, 3)),
        Step("concat", "c", (4, 2), (4, 2, 3)),
        Step("reshape", "r", (5,), (24,)),
    )
    index = torch.tensor([5, 5, 0, 23, 7, 1, 2, 3, 9, 10, 11, 0])
    result = emulate(program_of(*steps, public={"i": index}), {}, x).result
    narrow, gathered = x[:, 1:3], x.reshape(2, 24)[:, index].reshape(2, 2, 2, 3)
    torch.testing.assert_close(result, torch.cat([narrow - gathered + narrow, gathered], 1).reshape(2, 24))


@pytest.mark.parametrize("name", [name for name in CASES if name != "no_mask"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_result_lies_within_what_truncation_allows(name, rounding):
    program, tensors, images = case(name)
    allowed = bounds(program, tensors, images)
    result = emulate(program, tensors, images, rounding=rounding).result
    assert bool(((result.double() - allowed.centre).abs() <= allowed.radius + 1e-3).all())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gate", "leader", "shared_resnet")])
def test_result_equals_the_float_model(name):
    """Not where a prototype may be near 0: it flips under rounding and takes its replicates along."""
    program, tensors, images = case(name)
    result = decode(emulate(program, tensors, images).result)
    torch.testing.assert_close(result, CASES[name].model(CASES[name].images).double(), atol=64 * UNIT, rtol=2 * UNIT)


# truncation


def test_truncation_at_the_edges():
    v = torch.tensor([0, 1, -1, 2**15 - 1, 2**15, -(2**15), -(2**15) - 1, 2**16, -(2**16), 2**63 - 1, -(2**63)])
    assert truncate(v, 16, "floor").tolist() == [0, 0, -1, 0, 0, -1, -1, 1, -1, 2**47 - 1, -(2**47)]
    nearest = [0, 0, 0, 0, 1, 0, -1, 1, -1, -(2**47), -(2**47)]  # v + 2^15 itself wraps beyond 2^63
    assert truncate(v, 16, "nearest").tolist() == nearest
    for rounding in ROUNDINGS:
        assert torch.equal(truncate(v, 0, rounding), v)


@pytest.mark.parametrize("seeded", [True, False])
def test_random_truncation_is_distributed_as_two_parties_local_one(seeded):
    """Both give floor + 1 with the probability of the fraction: 3/8 here, 20,000 draws, 6 standard deviations."""
    v = torch.full((20_000,), 5 * 2**16 + 3 * 2**13)
    generator = torch.Generator().manual_seed(8)
    shares = torch.randint(-(2**63), 2**63 - 1, v.shape, generator=generator)
    parties = (shares >> 16) - (-(v - shares) >> 16)
    emulated = truncate(v, 16, "random", generator if seeded else None)
    for result in (parties, emulated):
        assert set(result.tolist()) == {5, 6}
        assert abs(float((result == 6).double().mean()) - 3 / 8) < 6 * (3 / 8 * 5 / 8 / 20_000) ** 0.5


def test_random_truncation_leaves_whole_numbers_alone():
    v = words(1000, seed=9, magnitude=2**40) << 16
    assert torch.equal(truncate(v, 16, "random"), v >> 16)


# gates


def test_gate_is_one_at_zero():
    program, tensors, images = case("gate")
    gate = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0], dtype=torch.bool).reshape(3, 4)  # -2^-18 rounds to 0
    assert torch.equal(run_gates(program, emulate(program, tensors, images, keep=True).values)[1][0, 0], gate)


@pytest.mark.parametrize("power", [30, 31, 32, 40, 62])
def test_32_bit_gates_are_right_below_the_bound_and_wrong_beyond(power):
    """DReLU by the low 32 bits alone: right for -2^31 <= x < 2^31 in LSB, else by bit 31, whatever the sign."""
    edge = 2**power
    x = torch.tensor([[0, 1, -1, edge - 1, edge, edge + 1, -edge + 1, -edge, -edge - 1]])
    program = program_of(Step("input", "x", (), (9,)), Step("relu", "r", (0,), (9,)))
    full, low = (emulate(program, {}, x, gate_bits=bits).result for bits in (64, 32))
    assert torch.equal(full, x.clamp(min=0))
    fits = (x >= -(2**31)) & (x < 2**31)
    assert torch.equal(low[fits], full[fits])
    by_bit_31 = torch.tensor([[value if value % 2**32 < 2**31 else 0 for value in x[0].tolist()]])
    assert torch.equal(low, by_bit_31)
    assert bool((low != full).any()) == (power > 30)


def test_32_bit_gates_on_random_words_err_where_the_range_ends():
    x = words(1, 20_000, seed=10, magnitude=2**40)
    program = program_of(Step("input", "x", (), (20_000,)), Step("relu", "r", (0,), (20_000,)))
    wrong = emulate(program, {}, x, gate_bits=32).result != x.clamp(min=0)
    assert not bool(wrong[(x.abs() < 2**31)].any())
    assert 0.45 < float(wrong[x.abs() >= 2**31].double().mean()) < 0.55  # bit 31 says nothing about the sign there


def test_a_follower_reads_its_leaders_gates():
    program, tensors, images = case("follower")
    values = dict(enumerate(emulate(program, tensors, images, keep=True).values))
    shared = [index for index, step in enumerate(program.steps) if step.op == "shared"]
    assert gate_makers(program) == (shared[0],)
    assert all(torch.equal(compared(program, program.steps[i], values), images[:, :2]) for i in shared)


def test_forced_gates_reach_leader_and_followers():
    program, tensors, images = case("follower")
    (maker,) = gate_makers(program)
    opened = {maker: torch.ones(len(images), 2, 3, 4, dtype=torch.bool)}
    forced = emulate(program, tensors, images, gates=opened).result
    assert not torch.equal(forced, emulate(program, tensors, images).result)
    leader = program.steps[maker]
    on = images * (tensors[leader.params["alpha"]] + tensors[leader.params["beta"]]) >> 16
    kept = emulate(program, tensors, images, gates=opened, keep=True).values
    assert torch.equal(kept[maker], on)


def test_overrides_stand_in_for_a_steps_value():
    program, tensors, images = case("follower")
    values = emulate(program, tensors, images, keep=True).values
    other = values[1] + 7
    result = emulate(program, tensors, images, keep=True, overrides={1: other}).values
    assert torch.equal(result[1], other)
    assert not torch.equal(result[-1], values[-1])


def test_values_are_kept_on_request_alone_and_the_result_is_the_same():
    program, tensors, images = case("shared_resnet")
    run, kept = emulate(program, tensors, images), emulate(program, tensors, images, keep=True)
    assert run.values is None
    assert [tuple(value.shape[1:]) for value in kept.values] == [step.shape for step in program.steps]
    assert torch.equal(run.result, kept.result)
    assert torch.equal(run.result, kept.values[-1])
