"""What all phases of a run have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepshare.checkpoint import load_checkpoint
from deepshare.data import Dataset
from deepshare.plan import Plan
from deepshare.train.compute import Compute
from deepshare.train.progress import Progress
from deepshare.train.recipe import Recipe
from deepshare.train.rows import Row
from deepshare.train.run_folder import RunFolder
from deepshare.train.slices import Allowance


@dataclass(frozen=True, eq=False)
class Run:
    """A run under way.

    keys: of the phases' artifacts; allowance: of this call; checkpoint_seconds: the least time between two checkpoints
    within a phase; rows: of the phases that have ended
    """

    recipe: Recipe
    folder: RunFolder
    dataset: Dataset  # on the device
    spec: dict[str, Any]
    plan: Plan
    device: torch.device
    progress: Progress
    keys: Mapping[str, str]
    allowance: Allowance
    checkpoint_seconds: float
    rows: list[Row] = field(default_factory=list)

    @property
    def compute(self) -> Compute:
        return self.recipe.compute.on(self.device)

    def end_of(self, phase: str) -> nn.Module:
        """The network as `phase` left it, on the device."""
        return load_checkpoint(self.folder.phase_end(phase)).model.to(self.device)
