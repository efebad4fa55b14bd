"""SharedReLU2d and MaskedReLU2d: values, gradients, state."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from deepshare import MaskedReLU2d, SharedReLU2d


def finite_values(dtype: torch.dtype) -> Tensor:
    """Every finite float16 or bfloat16 value; for wider dtypes these, and the dtype's own extremes and subnormals."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
    else:
        info = torch.finfo(dtype)
        subnormal = info.smallest_normal * info.eps
        own = [subnormal, 3 * subnormal, info.smallest_normal, info.max, 1.0 + info.eps, 1.0 - info.eps / 2, 0.0]
        both = torch.tensor(own, dtype=dtype)
        values = torch.cat(
            [patterns.view(torch.float16).to(dtype), patterns.view(torch.bfloat16).to(dtype), both, -both]
        )
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_prototypes_without_affine_change_are_relu(dtype: torch.dtype):
    values = finite_values(dtype)
    x = values[: len(values) // 12 * 12].reshape(1, 4, 3, -1)
    ours, theirs = (x.detach().requires_grad_() for _ in range(2))
    y, expected = SharedReLU2d(4, 4)(ours), torch.relu(theirs)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    away = x != 0
    assert torch.equal(ours.grad[away], theirs.grad[away])
    assert torch.equal(ours.grad[~away], torch.ones_like(x)[~away])  # the gate at 0 is 1 (DeepShare eq. 1)
    assert len(values) > 60000


def test_defaults():
    act = SharedReLU2d(6, 2)
    assert (act.channels, act.prototypes, act.soft_channels) == (6, 2, 0)
    assert act.alpha.tolist() == [1.0] * 6
    assert act.beta.tolist() == [0.0] * 6
    assert [name for name, _ in act.named_parameters()] == ["alpha", "beta"]
    assert list(SharedReLU2d(6, 2, affine=False).parameters()) == []
    assert set(SharedReLU2d(6, 2, affine=False).state_dict()) == set(act.state_dict())


def test_repr_says_the_state():
    act = SharedReLU2d(6, 2, gamma=4.0)
    assert "6, 2, affine=True, gamma=4\n" in repr(act)
    act.soft_channels = 5
    assert "6, 2, affine=True, gamma=4, soft_channels=5\n" in repr(act)


def test_on_the_meta_device():
    with torch.device("meta"):
        acts = [SharedReLU2d(8, 2), MaskedReLU2d(torch.ones(8, dtype=torch.bool))]
    acts[0].soft_channels = 3
    for act in (*acts, SharedReLU2d(8, 2).to("meta")):
        assert "8" in repr(act)
        assert act(torch.ones(1, 8, 2, 2, device="meta")).shape == (1, 8, 2, 2)
    source = SharedReLU2d(8, 2, gamma=2.0)
    source.soft_channels = 5
    acts[0].load_state_dict(SharedReLU2d(8, 2).to("meta").state_dict())
    acts[0].load_state_dict(source.state_dict(), assign=True)
    assert (acts[0].soft_channels, float(acts[0].gamma)) == (5, 2.0)
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(acts[0](x), source(x))


def test_a_hard_module_stays_hard_under_another_state():
    # the documented limit of the mirror of soft_switch; load_state_dict makes it soft
    soft, hard = SharedReLU2d(4, 2), SharedReLU2d(4, 2)
    soft.soft_channels = 4
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(torch.func.functional_call(hard, soft.state_dict(), x), SharedReLU2d(4, 2)(x))
    hard.load_state_dict(soft.state_dict())
    assert torch.equal(hard(x), soft(x))


def test_soft_everywhere_is_gelu():
    act = SharedReLU2d(4, 4)
    act.soft_channels = 4
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(act(x), nn.functional.gelu(x))
    sharp = SharedReLU2d(4, 4, gamma=4.0)
    sharp.soft_channels = 4
    torch.testing.assert_close(sharp(x), nn.functional.gelu(4 * x) / 4)


@pytest.mark.parametrize("count", [-1, 7, 2.0, True, "3", None])
def test_bad_soft_channels(count):
    act = SharedReLU2d(6, 2)
    act.soft_channels = 3
    with pytest.raises(
        ValueError, match=re.escape(f"SharedReLU2d: soft_channels must be an int in 0..6 (got {count!r})")
    ):
        act.soft_channels = count
    assert act.soft_channels == 3


def test_bad_prototypes_and_bad_input():
    with pytest.raises(ValueError, match=r"prototypes must be an int in 1\.\.6 \(got 7\)"):
        SharedReLU2d(6, 7)
    with pytest.raises(ValueError, match=r"x must be \[N, 6, \*S\]"):
        SharedReLU2d(6, 2)(torch.ones(2, 5, 3, 3))
    with pytest.raises(ValueError, match="source must be"):
        SharedReLU2d(6, 2)(torch.ones(2, 6, 3, 3), source=torch.ones(2, 6, 4, 4))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("soft", [0, 4])
def test_state_dict_round_trip(soft: int, affine: bool):
    act = SharedReLU2d(6, 3, affine=affine, gamma=2.0)
    act.channel_map.load_state_dict({"pi": torch.tensor([2, 0, 1, 1, 0, 2])})
    act.soft_channels = soft
    with torch.no_grad():
        act.alpha.uniform_()
        act.beta.uniform_()
    other = SharedReLU2d(6, 3, affine=affine)
    other.soft_channels = 1
    assert other.load_state_dict(act.state_dict()) == ([], [])
    assert (other.soft_channels, float(other.gamma)) == (soft, 2.0)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(other(x), act(x))
    assert not torch.equal(other(x), SharedReLU2d(6, 3)(x))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("channel_map.pi", torch.tensor([0, 1, 2, 3, 0, 1]), "pi must have values in 0..2 (got 0..3)"),
        ("channel_map.pi", torch.arange(6) % 2, "pi must be a map to 3 prototypes (got one to 2)"),
        ("channel_map.pi", torch.zeros(5, dtype=torch.int32), "pi must have 6 channels (got [5] for channel_map.pi)"),
        ("soft_switch", torch.tensor(7, dtype=torch.int32), "soft_channels must be an int in 0..6 (got 7)"),
        ("soft_switch", torch.tensor(-1, dtype=torch.int32), "soft_channels must be an int in 0..6 (got -1)"),
    ],
)
def test_damaged_state_is_refused(key: str, value: Tensor, message: str):
    act = SharedReLU2d(6, 3)
    act.soft_channels = 2
    state = {**act.state_dict(), key: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        act.load_state_dict(state)
    assert (act.soft_channels, act.channel_map.pi.tolist()) == (2, [0, 1, 2, 0, 1, 2])


def test_the_switch_goes_from_the_last_channel_to_the_first():
    act = SharedReLU2d(3, 1)
    x = torch.tensor([-1.0, 2.0, 2.0]).reshape(1, 3, 1, 1)
    soft = float(nn.functional.gelu(torch.tensor(-1.0))) / -1.0  # Phi(-1)
    seen = []
    for count in (3, 2, 1, 0):
        act.soft_channels = count
        seen.append(act(x).flatten().tolist())
    expected = [[-soft, 2 * soft, 2 * soft], [-soft, 2 * soft, 0.0], [-soft, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


@pytest.mark.parametrize(("soft", "flows"), [(4, True), (1, True), (0, False)])
def test_gradient_flows_into_the_leader_in_the_soft_phase_only(soft: int, flows: bool):
    act = SharedReLU2d(4, 2)
    act.soft_channels = soft
    x, source = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    act(x, source=source).sum().backward()
    assert (source.grad is not None) == flows
    if flows:
        assert source.grad[:, : min(soft, 2)].abs().min() > 0
        assert not source.grad[:, 2:].any()


def test_alpha_and_beta_learn_and_gamma_does_not():
    act = SharedReLU2d(4, 2)
    act.soft_channels = 4
    assert not act.gamma.requires_grad
    act(torch.randn(2, 4, 3, 3)).sum().backward()
    assert act.alpha.grad.abs().sum() > 0
    assert act.beta.grad.abs().sum() > 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_masked_relu(per_channel: bool):
    shape = (3,) if per_channel else (3, 4, 4)
    mask = torch.rand(shape) > 0.5
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = MaskedReLU2d(mask)(x)
    wide = mask.reshape(3, 1, 1) if per_channel else mask
    assert torch.equal(y, wide * torch.relu(x) + ~wide * x)  # SNL eq. 2 and 6
    y.sum().backward()
    assert torch.equal(x.grad, 1.0 - (wide & (x < 0)).float())


def test_masked_relu_state_and_errors():
    act = MaskedReLU2d(torch.tensor([True, False, True]))
    other = MaskedReLU2d(torch.zeros(3, dtype=torch.bool))
    other.load_state_dict(act.state_dict())
    assert other.mask.tolist() == [True, False, True]
    assert "kept=2" in repr(copy.deepcopy(other))
    with pytest.raises(TypeError, match=r"MaskedReLU2d: mask must be bool \(got torch.float32\)"):
        MaskedReLU2d(torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must be \[C, H, W\] or \[C\] \(got \[2, 2\]\)"):
        MaskedReLU2d(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must fit the mask \[3\] \(got \[2, 4, 5, 5\]\)"):
        act(torch.ones(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"x must fit the mask \[3, 4, 4\] \(got \[2, 3, 4, 5\]\)"):
        MaskedReLU2d(torch.ones(3, 4, 4, dtype=torch.bool))(torch.ones(2, 3, 4, 5))
