"""Where a training step's time goes: a table by stage, as Markdown on standard output.

    python bench/profile_train.py [--width 64] [--batch 128] [--budget 6000] [--steps 20] [--set compute.precision=fp32]

The GELU phase with its teacher on random images (training.py), first stage by stage, then the loop as it is trained: on
a GPU a replayed graph. A stage's time on a GPU is the sum of its kernels; what the loop takes beyond all of them is the
device waiting for the host. On a CPU it is the processor's time, which other processes do not add to with one thread.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from interleave import DEVICE, ON_GPU, per_call, synchronise
from torch.profiler import ProfilerActivity, profile, record_function
from training import PROVIDERS, Loop, loop

from deepshare.data import Batch
from deepshare.train.step import CapturedStep
from deepshare.train.task import Distillation

STAGES = ("data", "teacher forward", "student forward", "loss", "backward", "update")
LEAD = 5  # steps before the first that counts
clock: Callable[[], float] = time.process_time if not ON_GPU and torch.get_num_threads() == 1 else per_call


class Stages:
    """Seconds by stage, one number a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronise()
        started = clock()
        with record_function(name):  # to its end the device is done, so that its kernels lie within
            yield
            synchronise()
        self.seconds[name].append(clock() - started)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][LEAD:])


def staged_step(made: Loop, batches: Iterator[Batch], stage: Stages) -> None:
    """What made.step does, one stage after the other."""
    step, task = made.step, made.step.task
    assert isinstance(task, Distillation)
    with stage("data"):
        batch = next(batches)
    step.optimizer.zero_grad(set_to_none=True)
    with step.compute.autocast():
        with stage("teacher forward"):
            soft = task.teacher(batch)
        with stage("student forward"):
            logits = step.model(batch.images)
        with stage("loss"):
            loss = Distillation(lambda _: soft, task.temperature, task.weight)(lambda _: logits, batch)
    with stage("backward"):
        loss.backward()
    with stage("update"):
        step.optimizer.step()


def kernel_seconds(recorded: profile, steps: int) -> dict[str, float]:
    """The sum of the kernels that ran within each stage, a step's mean."""
    events = list(recorded.events() or [])
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in STAGES]
    spans = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU and e.name in STAGES]
    found: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for span in spans:
        inside = (k for k in kernels if span.time_range.start <= k.time_range.start < span.time_range.end)
        found[span.name] += sum(k.time_range.elapsed_us() for k in inside) / 1e6 / steps
    return found


def measure_stages(made: Loop, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    """Seconds of a step by stage."""
    stage = Stages()
    for _ in range(LEAD):
        staged_step(made, batches, stage)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) if ON_GPU else nullcontext() as recorded:
        for _ in range(steps):
            staged_step(made, batches, stage)
    return kernel_seconds(recorded, steps) if recorded else {name: stage.median(name) for name in STAGES}


def measure_loop(made: Loop, batches: Iterator[Batch], steps: int) -> float:
    """Seconds of a step of the loop as it is trained."""
    for _ in range(LEAD):
        made.step(next(batches))
    synchronise()
    started = clock()
    for _ in range(steps):
        made.step(next(batches))
    synchronise()
    return (clock() - started) / steps


def table(stages: dict[str, float], whole: float, images: int) -> Iterator[str]:
    rows = {**stages, "host gaps" if ON_GPU else "the rest": whole - sum(stages.values()), "a step as trained": whole}
    yield f"| {images} images | ms | share |"
    yield "| --- | --- | --- |"
    for name, seconds in rows.items():
        yield f"| {name} | {1e3 * seconds:.2f} | {seconds / whole:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 64), ("batch", 128), ("budget", 6000), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--provider", choices=PROVIDERS, default="shared")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    asked = parser.parse_args()
    sizes = (asked.provider, asked.width, asked.batch, asked.budget)
    staged = loop(*sizes, *asked.set, "compute.graph=false")  # a captured step has no stages
    stages = measure_stages(staged, staged.batches(), asked.steps)
    made = loop(*sizes, *asked.set)
    whole = measure_loop(made, made.batches(), asked.steps)
    how = "captured" if isinstance(made.step, CapturedStep) else "eager"
    print(f"ResNet18 width {asked.width}, {asked.provider}, {DEVICE}, {how}: {asked.batch / whole:,.0f} images/s\n")
    print("\n".join(table(stages, whole, asked.batch)))


if __name__ == "__main__":
    main()
