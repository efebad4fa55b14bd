"""SharedReLU2d and MaskedReLU2d beside nn.ReLU: forward and backward of one module, eager and compiled."""

import pytest
import torch
from interleave import DEVICE, Call, per_replayed_call, replay
from measure import Measure
from providers import randn
from shapes import ON_CPU, ON_GPU, Case
from torch import Tensor, nn

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


def forward_and_backward(provider: str, case: Case, residual: bool, compiled: bool) -> Call:
    torch.manual_seed(0)
    x, added, grad = randn(case, DEVICE, 3)
    activation = module(provider, case)
    leaves = [x.requires_grad_(), *([added.requires_grad_()] if residual else []), *activation.parameters()]

    def tail() -> Tensor:
        """What ends a residual block, or the activation alone."""
        if not residual:
            return activation(x)
        return activation(x, residual=added) if provider == "shared" else activation(x + added)

    run = torch.compile(tail, fullgraph=True, dynamic=False) if compiled else tail
    return lambda: torch.autograd.grad(run(), leaves, grad)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("case", CASES)
def test_module(measure: Measure, case: Case, residual: bool, compiled: bool, provider: str):
    with measure.stream():
        compared = ("relu",) if provider != "relu" else ()
        measure(
            replay(forward_and_backward(provider, case, residual, compiled)),
            {name: replay(forward_and_backward(name, case, residual, compiled)) for name in compared},
            kind="module",
            name=f"{'act(x + residual)' if residual else 'act(x)'}, {'compiled' if compiled else 'eager'}",
            provider=provider,
            baseline="relu",
            ours=provider != "relu",
            case=case,
            bytes_moved=(7 if residual else 5) * case.x_bytes,
        )
