"""Runs against the emulation, with planted mistakes among them."""

import pytest
import torch
from emulate_cases import CASES, case, program_of, two_party_values
from engine_cases import setup
from secure_cases import with_statistics

from deepshare import models
from deepshare.budget import allocate
from deepshare.checkpoint import load_checkpoint
from deepshare.plan import Plan, apply_plan
from deepshare.secure.emulate import (
    emulate,
    gate_makers,
)
from deepshare.secure.engine.protocol import Settings
from deepshare.secure.errors import SecureError
from deepshare.secure.exactness import check_locally, compare_steps, flips, run_gates
from deepshare.secure.fixed_point import encode
from deepshare.secure.label import with_label
from deepshare.secure.program import Step
from deepshare.secure.replay import replay


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
