"""The GELU phase with its teacher beside the same loop with nn.ReLU in the student: from augmentation to update.

The target is 0.9 of the ReLU loop's images a second, a ratio of times of 1.11 at most.
"""

from functools import cache

import pytest
from interleave import DEVICE, Call, per_call
from measure import Measure
from training import PROVIDERS, loop

pytestmark = pytest.mark.benchmark(timer=per_call)

# width, batch, budget: the paper's network (on a CPU with a small batch), and a narrow one
CASES = [(64, 128 if DEVICE == "cuda" else 16, 6000), (8, 128, 1920)]
LEAD = 5  # steps before the first that is timed: on a GPU three to warm up, and the capture


@cache  # one network each, as what is measured and as what that is compared with
def step(provider: str, width: int, batch: int, budget: int) -> Call:
    made = loop(provider, width, batch, budget)
    batches = made.batches()
    for _ in range(LEAD):
        made.step(next(batches))
    return lambda: made.step(next(batches))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("width", "batch", "budget"),
    [pytest.param(*case, id=f"width {case[0]}", marks=[pytest.mark.quick] if case[0] == 8 else []) for case in CASES],
)
def test_training_loop(measure: Measure, width: int, batch: int, budget: int, provider: str):
    compared = ("relu",) if provider != "relu" else ()
    measure(
        step(provider, width, batch, budget),
        {name: step(name, width, batch, budget) for name in compared},
        kind="loop",
        name="GELU phase with its teacher, augmentation to update",
        provider=provider,
        baseline="relu",
        ours=provider != "relu",
        case=f"ResNet18 width {width}, {batch} images of 3x32x32",
        images=batch,
    )
