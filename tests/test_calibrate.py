"""Ranges measured by hand, what they allow, and agreement with the float model where it can be computed by hand."""

import json
from copy import deepcopy

import pytest
import torch
from secure_cases import UNIT, cases
from torch import Tensor, nn

from deepshare.nn import SharedReLU2d
from deepshare.secure.agreement import agreement, real_values
from deepshare.secure.calibrate import GATE_LIMIT, MARGIN, Ranges, calibrate, fingerprint
from deepshare.secure.emulate import compared, emulate, gate_makers, gates_of
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import encode
from deepshare.secure.lower import lower
from deepshare.secure.program import Param, Program, Step

CASES = cases()


def small() -> tuple[Program, dict[str, Tensor], Tensor]:
    """x * w, then a ReLU; two images of three elements, in units of 1.0 here."""
    steps = (
        Step("input", "x", (), (3,)),
        Step("affine", "scale", (0,), (3,), params={"scale": "w"}),
        Step("relu", "act", (1,), (3,)),
    )
    program = Program(steps, {"w": Param((3,), 16)}, {})
    return program, {"w": encode(torch.tensor([2.0, -8.0, 0.5]))}, encode(torch.tensor([[1.0, 3, -4], [0.25, -1, 8]]))


def test_ranges_are_the_largest_magnitudes():
    ranges = calibrate(*small(), batch=1)
    (site,) = ranges.sites
    assert (site.index, site.name, site.op, site.largest, site.bits) == (
        2,
        "act",
        "relu",
        24.0,
        21,
    )  # 3 * -8, 24 * 2^16
    (layer,) = ranges.layers
    assert (layer.index, layer.name, layer.bits) == (1, "scale", 37)  # 24 * 2^32
    summed = 2 + 24 + 2 + 0.5 + 8 + 4  # of both images
    assert layer.wrong == summed * 2**32 / 2**64 / 2
    assert ranges.wrong == layer.wrong
    assert ranges.images == 2


def test_the_probability_of_a_wrong_truncation_is_the_measured_one():
    """|v| = 2^58 in 4,000 elements: 1/64 of them wrong, so 62.5 expected; 6 standard deviations."""
    steps = (Step("input", "x", (), (4000,)), Step("affine", "a", (0,), (4000,), params={"scale": "w"}))
    program, tensors = Program(steps, {"w": Param((1,), 16)}, {}), {"w": torch.tensor([2**20])}
    x = torch.full((1, 4000), 2**38)
    assert calibrate(program, tensors, x).wrong == 4000 / 64
    v, shares = x * 2**20, torch.randint(-(2**63), 2**63 - 1, x.shape, generator=torch.Generator().manual_seed(0))
    wrong = int((((shares >> 16) - (-(v - shares) >> 16)) - (v >> 16)).ne(0).sum())
    assert abs(wrong - 62.5) < 6 * (4000 / 64 * 63 / 64) ** 0.5


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_change_nothing(batch):
    program, tensors = lower(CASES["shared_resnet"].model, (1, 8, 8))
    images = encode(CASES["shared_resnet"].images)
    whole, parts = calibrate(program, tensors, images), calibrate(program, tensors, images, batch=batch)
    assert parts.sites == whole.sites
    assert parts.wrong == pytest.approx(whole.wrong, rel=1e-12)


def test_a_shared_sites_range_is_that_of_its_prototypes():
    """Replicates are not compared: their size does not matter to a gate."""
    program, tensors = lower(CASES["leader"].model, (4, 3, 4))
    images = torch.zeros(1, 4, 3, 4, dtype=torch.int64)
    images[0, 1, 0, 0], images[0, 3, 0, 0] = -5 << 16, 20_000 << 16
    ranges = calibrate(program, tensors, images)
    assert [site.largest for site in ranges.sites] == [5.0]
    assert ranges.gate_bits == 32


@pytest.mark.parametrize(("largest", "allowed"), [(GATE_LIMIT / MARGIN - UNIT, 32), (GATE_LIMIT / MARGIN, 64)])
def test_gates_of_32_bits_are_allowed_below_the_bound_alone(largest, allowed):
    program, tensors = lower(nn.Sequential(nn.ReLU()), (1, 1, 2))
    ranges = calibrate(program, tensors, encode(torch.tensor([1.0, -largest], dtype=torch.double).reshape(1, 1, 1, 2)))
    assert ranges.gate_bits == allowed
    ranges.check(64)
    if allowed == 32:
        ranges.check(32)
    else:
        with pytest.raises(SecureError, match=r"gate_bits must be 64: '0' compares values up to 4096, 32 bits need 8"):
            ranges.check(32)


def test_what_the_check_refuses_does_go_wrong():
    """Beyond 2^15 a 32-bit gate is wrong; within the margin it is right."""
    program, tensors = lower(nn.Sequential(nn.ReLU()), (1, 1, 2))
    for size, right in ((4000, True), (32767, True), (32768, False), (50_000, False)):
        images = torch.tensor([[[[size << 16, -5 << 16]]]])
        wide, low = (emulate(program, tensors, images, gate_bits=bits).result for bits in (64, 32))
        assert torch.equal(wide, low) == right


@pytest.mark.parametrize("scale", [1, 500, 10_000])
def test_a_networks_32_bit_gates_are_right_where_the_ranges_say_so(scale):
    """A network with random weights and ever larger inputs: gates go wrong where |x| >= 2^15 and nowhere else."""
    model = deepcopy(CASES["shared_resnet"].model)
    model.conv1.weight.mul_(8)
    program, tensors = lower(model, (1, 8, 8))
    images = encode(CASES["shared_resnet"].images * scale)
    full = dict(enumerate(emulate(program, tensors, images, keep=True).values))
    beyond = 0
    for index in gate_makers(program):
        x, step = compared(program, program.steps[index], full), program.steps[index]
        wrong = gates_of(program, step, full, 32) != gates_of(program, step, full)
        assert not bool(wrong[x.abs() < 2**31].any())
        beyond += int(wrong.sum())
    allowed = calibrate(program, tensors, images).gate_bits
    narrow = emulate(program, tensors, images, gate_bits=32).result
    assert (allowed, beyond > 0, torch.equal(narrow, full[len(program.steps) - 1])) == (
        (32, False, True) if scale <= 500 else (64, True, False)
    )


def test_the_nearest_site_is_named():
    program, tensors = lower(CASES["resnet"].model, (1, 8, 8))
    ranges = calibrate(program, tensors, encode(CASES["resnet"].images))
    assert ranges.nearest == max(ranges.sites, key=lambda site: site.largest)
    assert f"nearest to the bound is '{ranges.nearest.name}'" in str(ranges)


def test_ranges_survive_a_file(tmp_path):
    program, tensors, images = small()
    ranges = calibrate(program, tensors, images)
    assert Ranges.load(ranges.save(tmp_path / "ranges.json")) == ranges
    assert json.loads(ranges.to_json())["gate_bits"] == 32


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"sites": [], "layers": [], "images": 3}', '{"sites": [{"a": 1}]}']
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "ranges.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SecureError, match=r"ranges.json must be a file of ranges"):
        Ranges.load(path)


def test_ranges_of_other_weights_are_refused():
    program, tensors, images = small()
    ranges = calibrate(program, tensors, images)
    ranges.check(32, program, tensors)
    with pytest.raises(SecureError, match="other weights"):
        ranges.check(32, program, {"w": tensors["w"] + 1})
    other = Program((*program.steps[:2], Step("relu", "renamed", (1,), (3,))), program.params, {})
    assert fingerprint(other, tensors) != ranges.fingerprint
    with pytest.raises(SecureError, match=r"gate_bits must be 32 or 64 \(got 48\)"):
        ranges.check(48)


def test_a_value_that_leaves_the_ring_is_refused():
    program, tensors, images = small()
    with pytest.raises(SecureError, match=r"'scale' \(affine\) reaches 2\^63 before its truncation"):
        calibrate(program, {"w": tensors["w"] << 27}, images)
    with pytest.raises(SecureError, match="at least one"):
        calibrate(program, tensors, images[:0])


def test_a_network_without_gates_has_no_nearest_site():
    program, tensors = lower(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    ranges = calibrate(program, tensors, torch.ones(1, 1, 2, 2, dtype=torch.int64))
    assert (ranges.nearest, ranges.gate_bits, ranges.sites) == (None, 32, ())
    assert "32 bits" in str(ranges)


# agreement with the float model


@pytest.mark.parametrize("name", CASES)
def test_the_lowered_network_in_float64_is_the_model(name):
    case = CASES[name]
    shape = tuple(case.images.shape[1:])
    real = lower(case.model, shape, encoder=lambda values, bits, name: values.double())[1]
    program = lower(case.model, shape)[0]
    result = real_values(program, real, case.images.double())[-1]
    exact = deepcopy(case.model).double()(case.images.double())
    torch.testing.assert_close(result, exact, rtol=2e-6, atol=2e-6)  # a folded weight is a float32 again


class Threshold(nn.Module):
    """Logits (relu(w x), 0.5 relu(x)) of one pixel: a gate on w x that rounding w can turn."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.scale = nn.Conv2d(1, 2, 1, bias=True).requires_grad_(False)
        self.scale.weight.copy_(torch.tensor([weight, 1.0]).reshape(2, 1, 1, 1))
        self.scale.bias.copy_(torch.tensor([-1.0, 0.0]))
        self.relu, self.flat = nn.ReLU(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.relu(self.scale(x)))


def test_a_gate_that_the_encoder_turns_is_counted():
    """w x - 1 for w = 1 + 0.75 LSB, x = 1 - 0.375 LSB is positive; rounded it is 1 LSB, truncated -1 LSB."""
    model = Threshold(1 + 0.75 * UNIT)
    x = torch.tensor([1.0, 1 - 0.375 * UNIT]).reshape(2, 1, 1, 1)
    rounded, truncated = (agreement(model, x, encoding=encoding) for encoding in ("round", "truncate"))
    assert [site.gates for site in rounded.sites] == [4]
    assert (rounded.flips, rounded.own_flips) == (0, 0)
    assert (truncated.flips, truncated.own_flips) == (1, 1)
    (site,) = truncated.sites
    assert site.largest == pytest.approx(0.375 * UNIT, rel=1e-4)
    assert site.own_largest == pytest.approx(0.375, rel=1e-4)


def test_flips_that_follow_from_a_flip_are_told_apart():
    """A prototype of -0.25 LSB rounds to 0: its replicate of 100 passes, and the next site's -50 becomes 50."""
    model = nn.Sequential(SharedReLU2d(2, 1), nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    model[1].weight.fill_(1)
    model[1].bias.fill_(-50)
    first, second = agreement(model, torch.tensor([-0.25 * UNIT, 100]).reshape(1, 2, 1, 1)).sites
    assert (first.flips, first.own_flips, first.own_largest) == (1, 1, 0.25)
    assert (second.flips, second.largest, second.own_flips) == (1, 50.0, 0)


def test_agreement_of_trained_like_networks():
    case = CASES["shared_resnet"]
    labels = case.model(case.images).argmax(1)
    result = agreement(case.model, case.images, labels, rounding="random", batch=1)
    assert (result.images, result.double_agreement, result.accuracy_float) == (len(case.images), 1.0, 1.0)
    assert result.accuracy_integer == result.agreement
    assert result.gates == sum(site.gates for site in result.sites)
    assert [site.gates for site in result.sites] == [len(case.images) * 2 * side * side for side in (8, 4, 2, 1)]
    assert agreement(case.model, case.images).accuracy_float is None
    assert "argmax equal on" in str(result)


def test_32_bit_gates_disagree_where_the_range_is_too_large():
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    x = torch.tensor([40_000.0 / 2, 30_000.0]).reshape(1, 2, 1, 1)
    doubled = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False, groups=2), *model).requires_grad_(False)
    doubled[0].weight.data.fill_(2.0)
    assert agreement(doubled, x).flips == 0
    assert agreement(doubled, x, gate_bits=32).flips == 2


def test_accuracies_are_of_the_two_networks():
    """Logits 1 and 1 + 0.25 LSB: class 1 in floating point, a tie, which is class 0, in integers."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0], [1 + 0.25 * UNIT]]))
    result = agreement(model, torch.ones(1, 1, 1, 1), torch.tensor([1]))
    assert (result.accuracy_float, result.accuracy_integer) == (1, 0)
    assert (result.agreement, result.double_agreement, result.margin) == (0, 1, 0.25 * UNIT)


def test_wrong_arguments_are_named():
    model, x = CASES["relu"].model, CASES["relu"].images
    with pytest.raises(SecureError, match=r"images must be \[N, C, H, W\] with N > 0 \(got \[0, 4, 3, 4\]\)"):
        agreement(model, x[:0])
    with pytest.raises(SecureError, match=r"encoding must be 'round' or 'truncate' \(got 'up'\)"):
        agreement(model, x, encoding="up")


def test_truncating_encoder_drops_towards_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[2.6 * UNIT], [-2.6 * UNIT]]))
    x = torch.ones(1, 1, 1, 1)
    assert agreement(model, x).error == pytest.approx(0.4 * UNIT, rel=1e-3)
    assert agreement(model, x, encoding="truncate").error == pytest.approx(0.6 * UNIT, rel=1e-3)
