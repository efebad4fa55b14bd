"""What one party does from its job to its result, once CrypTen is initialised."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepshare.secure.baseline.evaluate import CLIENT, Evaluator
from deepshare.secure.baseline.material import Material
from deepshare.secure.program import Program


def run_job(
    crypten: ModuleType, job: dict[str, Any], on_progress: Callable[[str], None], on_images: Callable[[int], None]
) -> dict[str, Any]:
    """Runs every batch of the job and returns counters and times; at the client also the opened logits.

    Each batch size is run once beforehand: it warms up and records the material to deal. Then, per batch: deal,
    barrier, start the clock, share the images, evaluate, open to the client, stop the clock.

    Args:
        on_progress: called with a step's name before the step.
        on_images: called after each batch with its number of images.

    Returns:
        spent: (rounds, comm_bytes) per step and for the opening, of a full batch; online, dealing: seconds per batch;
        dealt: bytes per batch the dealer sent this party; undealt: comm_bytes of a full batch, its triples requested as
        it went; sizes: images per batch; received: names of the tensors this party was given; logits (client): int64
        [N, classes].
    """
    program = Program.from_plain(job["program"])
    names = [step.name for step in program.steps]
    evaluator = Evaluator(
        crypten, program, job.get("tensors"), secret=job["secret"], on_step=lambda index: on_progress(names[index])
    )
    material = Material(crypten, lambda: on_progress("dealing"))
    batches = _Batches(evaluator, program, job)
    result: dict[str, Any] = {"online": [], "dealing": [], "dealt": [], "sizes": batches.sizes, "logits": []}
    for size in sorted(set(batches.sizes), reverse=True):
        before = evaluator.counters()[1]
        material.record(size, lambda: batches.run(batches.sizes.index(size)))  # noqa: B023 (called at once)
        result.setdefault("undealt", evaluator.counters()[1] - before)
    for index, size in enumerate(batches.sizes):
        seconds, received = material.deal(size)
        result["dealing"].append(seconds)
        result["dealt"].append(received)
        crypten.communicator.get().barrier()
        start = time.perf_counter()
        logits, spent = batches.run(index)
        result["online"].append(time.perf_counter() - start)
        material.assert_used_up()
        result.setdefault("spent", spent)
        if logits is not None:
            result["logits"].append(logits)
        on_images(size)
    result["logits"] = torch.cat(result["logits"]) if result["logits"] else None
    result["received"] = sorted(job.get("tensors", {})) + (["images"] if "images" in job else [])
    return result


class _Batches:
    """The images cut into batches; at the server only their sizes."""

    def __init__(self, evaluator: Evaluator, program: Program, job: dict[str, Any]) -> None:
        self._evaluator = evaluator
        self._shape = program.steps[0].shape
        self._images: Tensor | None = job.get("images")
        self._starts = range(0, job["count"], job["batch"])
        self.sizes = [min(job["batch"], job["count"] - start) for start in self._starts]

    def run(self, index: int) -> tuple[Tensor | None, list[tuple[int, int]]]:
        """(logits at the client, counters per step and for the opening) of one batch."""
        start, size = self._starts[index], self.sizes[index]
        images = None if self._images is None else self._images[start : start + size]
        shared = self._evaluator.share(images, (size, *self._shape), CLIENT)
        result, spent = self._evaluator.run(shared)
        before = self._evaluator.counters()
        logits = self._evaluator.open_to_client(result)
        after = self._evaluator.counters()
        return logits, [*spent, (after[0] - before[0], after[1] - before[1])]
