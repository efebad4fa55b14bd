"""The GELU phase's loop as `deepshare train` runs it, on random images of CIFAR-100's size: no pixel costs more."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from interleave import DEVICE
from torch import nn

from deepshare import Plan, fuse
from deepshare.data import Batch, Dataset
from deepshare.data.dataset import Split
from deepshare.train import load_recipe, networks
from deepshare.train.compute import Compute
from deepshare.train.loop import make_optimizer
from deepshare.train.recipe import Recipe
from deepshare.train.step import TrainingStep, training_step
from deepshare.train.task import Distillation
from deepshare.train.teacher import Network

RECIPE = "deepshare-table1-6k"
WEIGHTS = "ResNet18_c100_relu50k"  # in place of an SNL run's counts
IMAGE, CLASSES = (3, 32, 32), 100
PROVIDERS = ("relu", "shared")


@dataclass
class Loop:
    """A step and the batches it takes, without end."""

    step: TrainingStep
    dataset: Dataset
    batch_size: int
    recipe: Recipe

    def batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.dataset.batches(
                "train", self.batch_size, augment=self.recipe.data.augment, seed=(epoch := epoch + 1)
            )


@cache
def random_images(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *IMAGE), dtype=torch.uint8, generator=generator)
    train, none = Split(images, torch.arange(count) % CLASSES), Split(images[:0], torch.zeros(0, dtype=torch.int64))
    return Dataset("random", CLASSES, IMAGE, (0.5,) * 3, (0.25,) * 3, train, none, none).to(DEVICE)


def loop(provider: str, width: int, batch_size: int, budget: int, *changes: str) -> Loop:
    """The GELU phase with its teacher; provider "relu" has nn.ReLU in the place of the shared gates.

    changes: of the recipe, as --set takes them
    """
    recipe = load_recipe(RECIPE, [f"model.width={width}", f"plan.budget={budget}", *changes])
    recipe = replace(recipe, plan=replace(recipe.plan, counts_of=None, weights=WEIGHTS))
    compute = recipe.compute.on(torch.device(DEVICE))
    spec = networks.model_spec(recipe.model, CLASSES, IMAGE)
    plan = networks.make_plan(recipe, spec)
    teacher = compute.place_frozen(_fresh(recipe, plan.replace_all("gelu"), "teacher"))
    student = _student(recipe, plan, provider, compute)
    task = Distillation(Network(teacher), recipe.distill.temperature, recipe.distill.weight)
    phase = recipe.phase_of("gelu")
    assert phase is not None
    step = training_step(fuse(student, IMAGE).train(), task, make_optimizer(student, phase), compute)
    images = 50_000 if DEVICE == "cuda" else 20 * batch_size
    return Loop(step, random_images(images), batch_size, recipe)


def _fresh(recipe: Recipe, plan: Plan, kind: str) -> nn.Module:
    return networks.fresh(recipe, networks.model_spec(recipe.model, CLASSES, IMAGE), plan, kind)


def _student(recipe: Recipe, plan: Plan, provider: str, compute: Compute) -> nn.Module:
    if provider == "relu":
        return compute.place(_fresh(recipe, plan.replace_all("relu"), "baseline"))
    student = _fresh(recipe, plan, "gelu")
    networks.soften(student)
    return compute.place(student)
