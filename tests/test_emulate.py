"""The emulation against plain Python integers, and runs with planted mistakes against the emulation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from engine_cases import setup
from secure_cases import UNIT, bounds, cases, with_statistics
from torch import Tensor

from deepshare import models
from deepshare.budget import allocate
from deepshare.checkpoint import load_checkpoint
from deepshare.plan import Plan, apply_plan
from deepshare.secure.emulate import (
    compared,
    emulate,
    gate_makers,
    gates_of,
    truncate,
    untruncated,
)
from deepshare.secure.engine.protocol import Settings
from deepshare.secure.errors import SecureError
from deepshare.secure.exactness import check_locally, compare_steps, flips, run_gates
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.label import with_label
from deepshare.secure.lower import lower
from deepshare.secure.program import Param, Program, Step
from deepshare.secure.replay import replay

CASES = cases()
ROUNDINGS = ("floor", "nearest", "random")
WORD = 2**64


def signed(value: int) -> int:
    """The representative of value mod 2^64 in [-2^63, 2^63)."""
    return (value + WORD // 2) % WORD - WORD // 2


def words(*shape: int, seed: int, magnitude: int = 2**63) -> Tensor:
    return torch.randint(-magnitude, magnitude - 1, shape, generator=torch.Generator().manual_seed(seed))


def program_of(*steps: Step, public: dict[str, Tensor] | None = None, **params: tuple[tuple[int, ...], int]) -> Program:
    return Program(steps, {key: Param(*param) for key, param in params.items()}, public or {})


def case(name: str) -> tuple[Program, dict[str, Tensor], Tensor]:
    program, tensors = lower(CASES[name].model, tuple(CASES[name].images.shape[1:]))
    return program, tensors, encode(CASES[name].images)


def two_party_values(program: Program, tensors: dict[str, Tensor], images: Tensor, seed: int = 0) -> list[Tensor]:
    """A run's steps as two parties would reconstruct them: every truncation on fresh random shares, each on its own."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[int, Tensor] = {0: images}
    for index, step in enumerate(program.steps[1:], 1):
        wide, bits = untruncated(program, tensors, step, values, gates_of(program, step, values))
        v_0 = torch.randint(-(2**63), 2**63 - 1, wide.shape, generator=generator)
        values[index] = (v_0 >> bits) - (-(wide - v_0) >> bits) if bits else wide
    return list(values.values())


# arithmetic


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


# a run against it


@pytest.mark.parametrize("name", CASES)
def test_two_parties_pass_the_local_check(name):
    program, tensors, images = case(name)
    run = two_party_values(program, tensors, images)
    assert check_locally(program, tensors, run, gates=run_gates(program, run)) == ()
    expected = emulate(program, tensors, images, gates=run_gates(program, run), keep=True).values
    differences = compare_steps(program, expected, run)
    assert max(step.largest for step in differences) <= 64  # with the run's gates nothing but truncation is left
    assert all(size <= 64 for step in differences if step.flips for size in step.flips.magnitudes.tolist())


@pytest.mark.parametrize(
    "settings", [Settings(), Settings("public", gate="tree", gate_bits=32)], ids=["secret", "public"]
)
@pytest.mark.parametrize("name", CASES)
def test_the_engine_passes_the_local_check(name, settings):
    """The engine's replay, which two parties equal bit for bit; with labels too."""
    parties = setup(CASES[name].model, CASES[name].images, settings)
    images, key = encode(CASES[name].images), parties.deal.server_key
    if settings.gate_bits == 32:
        images = images.clamp(-(2**29), 2**29)  # so that sums stay within 2^31
    replayed = replay(parties.protocol, parties.tensors, key, parties.deal.tickets(0), images)
    run, program = [*replayed.values[:-1], replayed.logits], parties.protocol.program
    assert check_locally(program, parties.tensors, run, gate_bits=settings.gate_bits) == ()
    followed = emulate(program, parties.tensors, images, gates=run_gates(program, run), keep=True).values
    assert max(step.largest for step in compare_steps(program, followed, run)) <= 64


def assert_only_truncation_is_between(model, images, batch, settings):
    """The engine's replay of all images: right step by step; with its gates followed, a few LSB from the emulation."""
    parties = setup(model, images[:batch], settings)
    program, tensors = parties.protocol.program, parties.tensors
    for number, part in enumerate(encode(images).split(batch)):
        replayed = replay(parties.protocol, tensors, parties.deal.server_key, parties.deal.tickets(number), part)
        run = [*replayed.values[:-1], replayed.logits]
        assert check_locally(program, tensors, run) == ()
        followed = emulate(program, tensors, part, gates=run_gates(program, run), keep=True).values
        for step in compare_steps(program, followed, run):
            assert step.largest <= 256  # the largest of 3,060 inferences seen: 101
            assert step.flips is None or all(size <= step.largest for size in step.flips.magnitudes.tolist())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", ["demo-240", "demo-relu"])
def test_1000_inferences_of_a_trained_network(recipe, tmp_path):
    from deepshare import data
    from deepshare.train import load_recipe, train

    model = load_checkpoint(train(load_recipe(recipe), tmp_path, device="cpu").checkpoint).model
    digits = data.load("digits")
    images = digits.normalise(torch.cat([digits.test.images, digits.train.images])[:1000])
    assert_only_truncation_is_between(model, images, 50, Settings(gate="tree"))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [6000, None])
def test_20_inferences_of_a_resnet18(budget):
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=100, stem_relu=budget is None)
    plan = Plan.of(model, (3, 32, 32))
    if budget is not None:
        plan = allocate(plan, "ResNet18_c100_relu50k", budget).plan
    model = with_statistics(apply_plan(model, plan), torch.Generator().manual_seed(0))
    assert_only_truncation_is_between(model, torch.randn(20, 3, 32, 32), 5, Settings(gate="tree"))


def test_a_label_is_the_index_of_the_largest_logit():
    program, tensors, images = case("layers")
    labelled = with_label(program)
    run = emulate(labelled, tensors, images, keep=True)
    assert torch.equal(run.result, emulate(program, tensors, images).result.argmax(1, keepdim=True))
    assert check_locally(labelled, tensors, two_party_values(labelled, tensors, images)) == ()
    assert check_locally(labelled, tensors, [*run.values[:-1], run.result + 1])[0].index == len(labelled.steps) - 1


@pytest.mark.parametrize("error", [2, -1, 2**48, -(2**48)])
def test_a_wrong_value_is_a_violation(error):
    program, tensors, images = case("shared_resnet")
    run = list(emulate(program, tensors, images, keep=True).values)
    index = next(i for i, step in enumerate(program.steps) if step.op == "conv2d")
    run[index] = run[index].clone()
    run[index][0, 1, 2, 3] += error
    found = check_locally(program, tensors, run)[0]
    assert (found.index, found.op, found.what, found.elements, found.largest) == (
        index,
        "conv2d",
        "value",
        1,
        abs(error),
    )
    assert found.wraps == (abs(error) == 2**48)


def test_a_share_that_wraps_in_its_truncation_is_counted_as_such():
    """v = 2^62: v_0 + v_1 leaves the range with probability |v| / 2^64, a quarter; 4,000 draws, 6 deviations."""
    steps = (Step("input", "x", (), (4000,)), Step("affine", "a", (0,), (4000,), params={"scale": "w"}))
    program, tensors = program_of(*steps, w=((1,), 16)), {"w": torch.tensor([2**16])}
    run = two_party_values(program, tensors, torch.full((1, 4000), 2**46))
    (found,) = check_locally(program, tensors, run)
    assert found.wraps == found.elements
    assert abs(found.elements / 4000 - 1 / 4) < 6 * (3 / 16 / 4000) ** 0.5
    assert found.largest in (2**48 - 1, 2**48)
    assert "wrapped in truncation" in str(found)


def test_one_too_much_is_a_violation_where_nothing_is_dropped():
    program, tensors, images = case("resnet")
    run = list(emulate(program, tensors, images, keep=True).values)
    for op in ("add", "relu"):
        index = next(i for i, step in enumerate(program.steps) if step.op == op)
        changed = list(run)
        changed[index] = run[index] + 1
        assert check_locally(program, tensors, changed)[0].index == index


def test_one_too_much_is_a_violation_where_the_product_is_exact():
    """1.0 * w needs no rounding: w + 1 LSB is then wrong, although within 1 LSB."""
    x, w = torch.tensor([[2**16]]), torch.tensor([[12345]])
    steps = (Step("input", "x", (), (1,)), Step("linear", "l", (0,), (1,), params={"weight": "w"}))
    program = program_of(*steps, w=((1, 1), 16))
    assert check_locally(program, {"w": w}, [x, torch.tensor([[12345]])]) == ()
    (found,) = check_locally(program, {"w": w}, [x, torch.tensor([[12346]])])
    assert (found.largest, found.wraps) == (1, 0)
    half = torch.tensor([[2**15]])
    for value, wrong in ((6172, 0), (6173, 0), (6174, 1), (6171, 1)):
        assert len(check_locally(program, {"w": w}, [half, torch.tensor([[value]])])) == wrong


def test_a_flipped_gate_is_a_violation_in_its_effect_and_by_itself():
    program, tensors, images = case("shared_resnet")
    maker = gate_makers(program)[0]
    gates = run_gates(program, emulate(program, tensors, images, keep=True).values)
    gates[maker] = gates[maker].clone()
    gates[maker][0, 0, 0, 0] ^= True
    run = emulate(program, tensors, images, keep=True, gates=gates).values
    effect = check_locally(program, tensors, run)
    leader = program.steps[maker]
    users = {i for i, step in enumerate(program.steps) if step.gates == leader.gates}
    assert {violation.index for violation in effect} == users
    both = check_locally(program, tensors, run, gates=gates)
    named = [violation for violation in both if violation.what == "gate"]
    assert [(violation.index, violation.elements) for violation in named] == [(maker, 1)]
    source = dict(enumerate(run))[leader.gates[0]]
    assert named[0].largest == abs(int(source[0, 0, 0, 0]))


def test_flips_are_counted_with_how_far_from_zero_they_were():
    program, tensors, images = case("relu")
    expected = emulate(program, tensors, images, keep=True).values
    moved = images.clone()
    moved[0, 0, 0, 0], moved[0, 1, 1, 1] = -3, 5  # from 0; from 0 too (-2^-18 rounds to 0)
    moved[0, 1, 2, 1] = 70_000  # from -1.0 = -65,536
    actual = emulate(program, tensors, moved, keep=True).values
    (found,) = flips(program, expected, actual)
    assert found.gates == images.numel()
    changed = (images >= 0) != (moved >= 0)
    assert found.magnitudes.tolist() == torch.maximum(images.abs(), moved.abs())[changed].tolist()
    assert 3 in found.magnitudes.tolist()
    assert compare_steps(program, expected, actual)[1].flips.count == found.count


def test_flips_of_a_mask_are_those_of_its_kept_elements():
    program, tensors, images = case("mask")
    expected = emulate(program, tensors, images, keep=True).values
    (found,) = flips(program, expected, emulate(program, tensors, -images, keep=True).values)
    kept = images.flatten(1)[:, program.public[program.steps[-1].public["index"]]]
    assert (found.gates, found.count) == (kept.numel(), int((kept != 0).sum()))


# errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding": "up"}, "rounding must be 'floor', 'nearest' or 'random' (got 'up')"),
        ({"gate_bits": 16}, "gate_bits must be 32 or 64 (got 16)"),
        ({"images": torch.zeros(1, 4, 3, 4)}, "images must be int64 ['N', 4, 3, 4] (got torch.float32 [1, 4, 3, 4])"),
        ({"images": torch.zeros(4, 3, 4).long()}, "images must be int64 ['N', 4, 3, 4] (got torch.int64 [4, 3, 4])"),
        ({"tensors": {}}, "tensors['0.alpha'] must be int64 [4, 1, 1] (got none)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    program, tensors, images = case("gate")
    arguments = {"tensors": tensors, "images": images, **change}
    with pytest.raises(SecureError) as raised:
        emulate(program, **arguments)
    assert message in str(raised.value)


def test_an_unknown_step_is_named():
    program = program_of(Step("input", "x", (), (2,)), Step("softmax", "s", (0,), (2,)))
    with pytest.raises(SecureError, match=r"step 's' must be one of conv2d, .* \(got softmax\)"):
        emulate(program, {}, torch.zeros(1, 2, dtype=torch.int64))


def test_a_run_of_another_shape_is_refused():
    program, tensors, images = case("gate")
    values = list(emulate(program, tensors, images, keep=True).values)
    with pytest.raises(SecureError, match=r"values must have 2 steps \(got 1\)"):
        check_locally(program, tensors, values[:1])
    with pytest.raises(SecureError, match=r"actual\[1\] \('0'\) must be int64 \[1, 4, 3, 4\]"):
        flips(program, values, [values[0], values[1][..., :2]])
    with pytest.raises(SecureError, match="expected"):
        compare_steps(program, [value.double() for value in values], values)
