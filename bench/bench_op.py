"""Every form of the operator, forward and backward, beside PyTorch's; each row's ratios are of calls made in turns.

    python -m pytest bench/bench_op.py --benchmark-only --benchmark-json=op.json

On a GPU a round replays a CUDA graph of many calls: the time is the device's. bench_host.py has the host's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from calls import Calls, backend_of
from interleave import DEVICE, Call, per_replayed_call, replay
from measure import Measure
from providers import BACKENDS, FORMS
from shapes import ON_CPU, ON_GPU, Case, bytes_moved

pytestmark = pytest.mark.benchmark(timer=per_replayed_call)

SHAPES = ON_GPU if DEVICE == "cuda" else ON_CPU
STAGE1, STAGE4, MIDDLE, LARGE = SHAPES
FLOAT, HALF = torch.float32, torch.bfloat16
QUICK = (Case(MIDDLE, FLOAT), Case(MIDDLE, FLOAT, "nhwc"))
PLAIN = (
    *QUICK,
    Case(LARGE, FLOAT),
    Case(LARGE, FLOAT, "nhwc"),
    *(Case(shape, FLOAT, layout) for shape in (STAGE1, STAGE4) for layout in ("nchw", "nhwc")),
    *(Case(shape, HALF, layout) for shape in (MIDDLE, LARGE) for layout in ("nchw", "nhwc")),
)
OTHERS = (*QUICK, Case(MIDDLE, HALF))
RESIDUALS = (*OTHERS, Case(LARGE, FLOAT))  # and followers: what a fused network is made of
SHARES = (Case(MIDDLE, torch.int64), Case(MIDDLE, torch.int64, "nhwc"))


class Row(NamedTuple):
    """One benchmark."""

    form: str
    direction: str
    case: Case
    provider: str

    @property
    def is_quick(self) -> bool:
        """Of `make bench BENCH=quick`: the middle size in NCHW, and the largest where a target names it."""
        target = self.form == "plain" and self.case == Case(LARGE, FLOAT) and self.provider in BACKENDS[DEVICE]
        return target or self.case in (QUICK[0], SHARES[0])

    def __str__(self) -> str:
        return f"{self.form} {self.direction} {self.case} {self.provider}".replace(" ", "-")


def rows() -> Iterator[Row]:
    cases = {"plain": PLAIN, "residual": RESIDUALS, "follower": RESIDUALS, "share": SHARES}
    for name, form in FORMS.items():
        for direction in form.directions:
            clone = ("clone",) if name == "plain" and direction == "forward" else ()
            for case in cases.get(name, OTHERS):
                for provider in (*clone, *form.theirs, *BACKENDS[DEVICE]):
                    if not (provider == "eager" and case.shape == LARGE):  # seconds a round, and ours has its ratio
                        yield Row(name, direction, case, provider)


ROWS = [pytest.param(row, id=str(row), marks=[pytest.mark.quick] if row.is_quick else []) for row in rows()]


def references(calls: Calls, provider: str) -> dict[str, Call]:
    """What a provider is compared with: ours with all, the others with the baseline and a clone."""
    backend = backend_of(provider)
    names = tuple(calls.form.theirs) if backend else (calls.form.baseline,)
    return {name: calls.call(name, backend) for name in (*names, "clone") if name != provider}


@pytest.mark.parametrize("row", ROWS)
def test_op(measure: Measure, row: Row):
    backend = backend_of(row.provider)
    measure.need(backend)
    with torch.set_grad_enabled(row.direction == "backward"), measure.stream():
        calls = Calls(row.form, row.direction, row.case)
        moved = ("plain", "forward") if row.provider == "clone" else (row.form, row.direction)
        measure(
            replay(calls.call(row.provider, backend)),
            {name: replay(reference) for name, reference in references(calls, row.provider).items()},
            kind="op",
            name=f"{row.form} {row.direction}",
            provider=row.provider,
            baseline=calls.form.baseline,
            ours=backend is not None,
            case=row.case,
            bytes_moved=bytes_moved(*moved, row.case),
        )
