"""Bytes saved for the backward pass, by saved_tensors_hooks, and on a GPU the most that a forward and backward hold.

What is timed is the forward pass that saves.
"""

from collections.abc import Iterable, Iterator

import pytest
import torch
from calls import Calls, backend_of
from interleave import DEVICE, ON_GPU, Call, per_call, synchronise
from measure import Measure
from providers import BACKENDS, FORMS
from shapes import ON_CPU, Case
from shapes import ON_GPU as GPU_SHAPES
from torch import Tensor

pytestmark = [pytest.mark.benchmark(timer=per_call), pytest.mark.quick]

CASE = Case((GPU_SHAPES if ON_GPU else ON_CPU)[0])


def rows() -> Iterator[tuple[str, str]]:
    for form, made in FORMS.items():
        if "backward" in made.directions:
            for provider in (*made.theirs, *BACKENDS[DEVICE]):
                yield form, provider


def saved_bytes(call: Call, inputs: Iterable[Tensor]) -> tuple[int, int]:
    """(all bytes kept for backward, those of them that are no input of the operator), each storage once."""
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        result = call()  # alive, so that no two storages have one address
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    del result
    return sum(kept.values()), sum(size for address, size in kept.items() if address not in known)


def peak_bytes(call: Call) -> int | None:
    """Bytes that one call holds at most, beyond what stood before; None without a GPU."""
    if not ON_GPU:
        return None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("form", "provider"), list(rows()))
def test_memory(measure: Measure, form: str, provider: str):
    backend = backend_of(provider)
    measure.need(backend)
    calls = Calls(form, "both", CASE)
    function, baseline = calls.function(provider, backend), calls.function(calls.form.baseline, backend)
    inputs = (*calls.leaves, *calls.inputs.given, *calls.inputs.channel_map.buffers())
    saved, beyond = saved_bytes(lambda: function(*calls.leaves), inputs)
    whole = calls.call(provider, backend)
    whole()
    measure(
        lambda: function(*calls.leaves),
        {} if provider == calls.form.baseline else {calls.form.baseline: lambda: baseline(*calls.leaves)},
        kind="memory",
        name=f"{form} forward",
        provider=provider,
        baseline=calls.form.baseline,
        ours=backend is not None,
        case=CASE,
        saved_bytes=saved,
        saved_beyond_inputs=beyond,
        gate_bytes=CASE.gate_bytes,
        peak_bytes=peak_bytes(whole),
    )
