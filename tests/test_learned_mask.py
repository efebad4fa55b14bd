"""SNL's modules: the mask that is learned, and the variant that puts 0 where no ReLU is kept."""

import pytest
import torch

from deepshare.nn import LearnedMask, MaskedReLU2d
from deepshare.plan import Plan, PlanError, Site, apply_plan


@pytest.mark.parametrize("shape", [(3, 4, 4), (3,)])
@pytest.mark.parametrize("zero_out", [False, True])
def test_values_and_gradients_are_the_formula(shape, zero_out):
    layer = LearnedMask(shape, zero_out=zero_out).double()
    torch.nn.init.uniform_(layer.mask, -0.5, 1.5)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = layer(x)
    y.backward(grad)
    ours = (y, x.grad, layer.mask.grad)
    x2, mask = x.detach().clone().requires_grad_(), layer.mask.detach().clone().requires_grad_()
    c = mask if len(shape) == 3 else mask.reshape(3, 1, 1)
    expected = c * torch.relu(x2) + (0 if zero_out else (1 - c) * x2)
    expected.backward(grad)
    for got, wanted in zip(ours, (expected, x2.grad, mask.grad), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_new_mask_is_a_relu():
    x = torch.randn(2, 3, 4, 4)
    for layer in (LearnedMask((3, 4, 4)), LearnedMask((3,)), LearnedMask((3,), zero_out=True)):
        assert torch.equal(layer(x), torch.relu(x))


@pytest.mark.parametrize("mask", [torch.rand(3, 4, 4) > 0.5, torch.tensor([True, False, True])])
def test_zero_out_puts_0_where_no_relu_is_kept(mask):
    x = torch.randn(2, 3, 4, 4)
    x[0, :, 0, 0] = torch.inf
    y = MaskedReLU2d(mask, zero_out=True)(x)
    keep = mask.reshape(3, 1, 1).expand(3, 4, 4) if mask.dim() == 1 else mask
    assert torch.equal(y, torch.where(keep, torch.relu(x), 0.0))
    assert "zero_out=True" in repr(MaskedReLU2d(mask, zero_out=True))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"LearnedMask: shape must be \(C, H, W\) or \(C,\) \(got \(3, 4\)\)"):
        LearnedMask((3, 4))
    with pytest.raises(ValueError, match="masked_relu: x must be"):
        LearnedMask((3, 4, 4))(torch.zeros(1, 3, 4, 5))


def test_zero_out_belongs_to_masks_alone_and_survives_a_plan():
    with pytest.raises(PlanError, match="only a mask site has it"):
        Site("act", (3, 4, 4), "relu", zero_out=True)
    mask = torch.rand(3, 4, 4) > 0.5
    with pytest.raises(PlanError, match="true or false"):
        Site("act", (3, 4, 4), "mask", mask=mask, zero_out=1)  # type: ignore[arg-type]
    model = torch.nn.Sequential(torch.nn.ReLU())
    plan = Plan.of(model, (3, 4, 4)).replace("0", "mask", mask=mask, zero_out=True)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.of(apply_plan(model, plan), (3, 4, 4)) == plan != plan.replace("0", "mask", mask=mask)
    assert plan.drelus == int(mask.sum())
