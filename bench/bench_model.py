"""ResNet18 with SharedReLU2d at every site beside the plain one: inference and a training step, eager and compiled."""

from functools import cache

import pytest
import torch
from interleave import DEVICE, Call, per_call
from measure import Measure
from torch import nn
from torch.nn import functional as F

from deepshare import Plan, apply_plan, fuse, models

pytestmark = pytest.mark.benchmark(timer=per_call)

BATCH = 128 if DEVICE == "cuda" else 8
IMAGE = (3, 32, 32)
CASES = ["float32 nchw"] + (["bfloat16 autocast nhwc"] if DEVICE == "cuda" else [])
CHANNELS_A_PROTOTYPE = 4
PROVIDERS = ("relu", "shared", "fused")


def network(provider: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=100)
    if provider == "relu":
        return model.to(DEVICE)
    plan = Plan.of(model, IMAGE)
    for site in plan.sites:
        plan = plan.replace(site.name, "shared", prototypes=site.channels // CHANNELS_A_PROTOTYPE)
    shared = apply_plan(model, plan)
    return (fuse(shared, IMAGE) if provider == "fused" else shared).to(DEVICE)


@cache  # compiled once, as what is measured and as what that is compared with
def step(provider: str, case: str, training: bool, compiled: bool) -> Call:
    """One inference, or one step of SGD."""
    images = torch.randn(BATCH, *IMAGE, device=DEVICE)
    labels = torch.randint(100, (BATCH,), device=DEVICE)
    half, model = case.startswith("bfloat16"), network(provider).train(training)
    if half:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def infer() -> None:
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            run(images)

    def train() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train if training else infer


def run(measure: Measure, provider: str, case: str, training: bool, compiled: bool) -> None:
    compared = ("relu",) if provider != "relu" else ()
    measure(
        step(provider, case, training, compiled),
        {name: step(name, case, training, compiled) for name in compared},
        kind="step" if training else "model",
        name=f"ResNet18 {'training step' if training else 'inference'}, {'compiled' if compiled else 'eager'}",
        provider=provider,
        baseline="relu",
        ours=provider != "relu",
        case=f"{BATCH} images of {'x'.join(map(str, IMAGE))}, {case}",
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "compiled", [pytest.param(False, marks=pytest.mark.quick, id="eager"), pytest.param(True, id="compiled")]
)
@pytest.mark.parametrize("case", CASES)
def test_inference(measure: Measure, case: str, compiled: bool, provider: str):
    run(measure, provider, case, training=False, compiled=compiled)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(900)  # a network's backward pass takes Inductor minutes on a CPU
def test_training_step(measure: Measure, case: str, compiled: bool, provider: str):
    run(measure, provider, case, training=True, compiled=compiled)
