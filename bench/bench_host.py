"""What a call costs the host, beyond the kernel: every form on a tensor of 32 elements.

On a GPU the calls are queued and not waited for.
"""

from collections.abc import Iterator

import pytest
import torch
from calls import Calls, backend_of
from interleave import DEVICE, per_queued_call, queue
from measure import Measure
from providers import BACKENDS, FORMS
from shapes import Case, Shape

pytestmark = [pytest.mark.benchmark(timer=per_queued_call), pytest.mark.quick]

TINY = Case(Shape(1, 8, 2, 2))
NAMES = {"forward": "forward", "both": "forward + backward"}


def rows() -> Iterator[tuple[str, str, str]]:
    for form, made in FORMS.items():
        directions = ("forward", "both") if made.directions != ("forward",) else ("forward",)
        for direction in directions:
            for provider in (made.baseline, *BACKENDS[DEVICE]):
                yield form, direction, provider


@pytest.mark.parametrize(("form", "direction", "provider"), list(rows()))
def test_host_time(measure: Measure, form: str, direction: str, provider: str):
    backend = backend_of(provider)
    measure.need(backend)
    case = Case(TINY.shape, torch.int64) if form == "share" else TINY
    with torch.set_grad_enabled(direction == "both"):
        calls = Calls(form, direction, case)
        baseline = calls.form.baseline
        compared = (baseline,) if provider != baseline else ()
        measure(
            queue(calls.call(provider, backend)),
            {name: queue(calls.call(name, backend)) for name in compared},
            kind="host",
            name=f"{form} {NAMES[direction]}",
            provider=provider,
            baseline=baseline,
            ours=backend is not None,
            case=case,
        )
