"""The tables of a recipe but its plan and phases: data, model, distillation, and the published row it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deepshare import data, models
from deepshare.data import Augment, Dataset
from deepshare.train.errors import require

MAX_SEED = 2**63 - 1  # what torch.Generator and TOML both hold


@dataclass(frozen=True)
class DataRecipe:
    """Which images: deepshare.data.load's arguments (`load`), and what is done to a training batch."""

    name: Literal["digits", "cifar10", "cifar100", "cifar100-coarse", "tiny-imagenet"]
    val_fraction: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        require(0 <= self.val_fraction < 1, f"data.val_fraction: wanted 0 <= v < 1, got {self.val_fraction}")
        require(0 <= self.split_seed <= MAX_SEED, f"data.split_seed: wanted 0 to 2^63 - 1, got {self.split_seed}")
        require(self.limit is None or self.limit > 1, f"data.limit: wanted at least 2, got {self.limit}")

    def load(self, root: str | Path | None) -> Dataset:
        """The images; `root` is the folder of the official files. Raises DataError."""
        return data.load(self.name, root, val_fraction=self.val_fraction, seed=self.split_seed, limit=self.limit)


@dataclass(frozen=True)
class ReuseRecipe:
    """ReLU-reuse in some convolutions (docs/deepreshape.md): their module paths, N, the form of the groups."""

    layers: tuple[str, ...]
    factor: int
    form: Literal["three", "naive"] = "three"
    shortcuts: bool = True


@dataclass(frozen=True)
class ModelRecipe:
    """deepshare.models.create's arguments; width as published by default (or channels' first), so are the last five."""

    name: str
    width: int | None = None
    stem_relu: bool = False
    multipliers: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    rho: float | None = None
    reuse: ReuseRecipe | None = None
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.width is None and self.channels:
            object.__setattr__(self, "width", self.channels[0])
        elif self.width is None and models.is_name(self.name):
            object.__setattr__(self, "width", models.default_width(self.name))
        fits = self.width is None or 0 < self.width <= models.MAX_WIDTH
        require(fits, f"model.width: wanted 1 to {models.MAX_WIDTH}, got {self.width}")


@dataclass(frozen=True)
class DistillRecipe:
    """loss = (1 - weight) * CE(labels) + weight * temperature^2 * D(teacher || student), both at `temperature`.

    method: D is "kd", Hinton's KL, or "dkd", alpha * TCKD + beta * NCKD (deepshare.train.task)
    """

    temperature: float = 4.0
    weight: float = 0.5
    method: Literal["kd", "dkd"] = "kd"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        for name, value, default in (("alpha", self.alpha, 1.0), ("beta", self.beta, 8.0)):
            fits = self.method == "dkd" or value is None
            require(fits, f'distill.{name}: wanted with method "dkd" alone, got {value}')
            require(value is None or value >= 0, f"distill.{name}: wanted at least 0, got {value}")
            if self.method == "dkd" and value is None:
                object.__setattr__(self, name, default)
        require(self.temperature > 0, f"distill.temperature: wanted above 0, got {self.temperature}")
        require(0 <= self.weight <= 1, f"distill.weight: wanted 0 <= w <= 1, got {self.weight}")


@dataclass(frozen=True)
class PublishedRow:
    """The row of published.csv that a recipe is for; it decides nothing. The figure itself stands there alone.

    paper, table, method, network, dataset: as there; relus_k: thousands of ReLUs (of DReLUs for DeepShare), as printed
    note: what else is to be said of the comparison
    """

    paper: str
    table: str
    method: str
    network: str
    dataset: str
    relus_k: float
    note: str | None = None
