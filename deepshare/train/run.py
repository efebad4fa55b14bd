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
from deepshare.train.distributed import Ranks
from deepshare.train.loop import evaluate
from deepshare.train.progress import Progress
from deepshare.train.recipe import Recipe
from deepshare.train.rows import Row
from deepshare.train.run_folder import RunFolder
from deepshare.train.slices import Allowance

EVAL_BATCH = 512


@dataclass(frozen=True, eq=False)
class Run:
    """A run under way.

    keys: of the phases' artifacts; allowance: of this call; checkpoint_seconds: the least time between two checkpoints
    within a phase; rows: of the phases that have ended; ranks: the processes that train it together. What is written is
    written by the first of them (ranks.from_writer), while the others wait
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
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def compute(self) -> Compute:
        return self.recipe.compute.on(self.device, self.ranks.world)

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model` for training by all ranks (Ranks.parallel)."""
        return self.ranks.parallel(model, sync_batch_norm=self.compute.sync_batch_norm)

    def unite_statistics(self, model: nn.Module) -> None:
        """After an epoch: batch norms that were not synced take rank 0's statistics."""
        if not self.compute.sync_batch_norm:
            self.ranks.take_buffers(model)

    def accuracy(self, model: nn.Module, split: str) -> float | None:
        """Share of the split's images that `model` is right about, counted by all ranks together."""
        return evaluate(model, self.dataset.batches(split, EVAL_BATCH, share=self.ranks.share), self.ranks)

    def end_of(self, phase: str) -> nn.Module:
        """The network as `phase` left it, on the device."""
        return load_checkpoint(self.folder.phase_end(phase)).model.to(self.device)
