"""SharedReLU2d and MaskedReLU2d beside nn.ReLU: forward and backward of one module, eager and compiled."""

import pytest
import torch
from interleave import DEVICE, Call, per_replayed_call, replay
from measure import Measure
from providers import randn
from shapes import ON_CPU, ON_GPU, Case
from torch import nn

from deepshare import MaskedReLU2d, SharedReLU2d

pytestmark = pytest.mark.benchmark(timer=per_replayed_call)

STAGE1, _, MIDDLE, _ = ON_GPU if DEVICE == "cuda" else ON_CPU
CASES = [
    pytest.param(Case(shape, torch.float32, layout), id=f"{shape}-{layout}", marks=marks)
    for shape, layout, marks in (
        (MIDDLE, "nchw", [pytest.mark.quick]),
        (MIDDLE, "nhwc", []),
        (STAGE1, "nchw", []),
        (STAGE1, "nhwc", []),
    )
]
PROVIDERS = ("relu", "shared", "masked")


def module(provider: str, case: Case) -> nn.Module:
    _, channels, height, width = case.shape.dimensions
    if provider == "relu":
        return nn.ReLU()
    if provider == "shared":
        return SharedReLU2d(channels, case.shape.prototypes).to(DEVICE)
    return MaskedReLU2d(torch.rand(channels, height, width) >= 0.5).to(DEVICE)


def forward_and_backward(provider: str, case: Case, compiled: bool) -> Call:
    torch.manual_seed(0)
    x, grad = randn(case, DEVICE, 2)
    activation = module(provider, case)
    leaves = [x.requires_grad_(), *activation.parameters()]
    run = torch.compile(activation, fullgraph=True, dynamic=False) if compiled else activation
    return lambda: torch.autograd.grad(run(x), leaves, grad)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_module(measure: Measure, case: Case, compiled: bool, provider: str):
    with measure.stream():
        compared = ("relu",) if provider != "relu" else ()
        measure(
            replay(forward_and_backward(provider, case, compiled)),
            {name: replay(forward_and_backward(name, case, compiled)) for name in compared},
            kind="module",
            name=f"forward + backward, {'compiled' if compiled else 'eager'}",
            provider=provider,
            baseline="relu",
            ours=provider != "relu",
            case=case,
            bytes_moved=5 * case.x_bytes,
        )
