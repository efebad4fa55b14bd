"""How a run computes, not what: precision, memory format, captured steps, compilation (recipe table [compute])."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from deepshare.train.errors import require


@dataclass(frozen=True)
class Compute:
    """A ComputeRecipe resolved for a device: what is done there.

    bf16: convolutions and matrix products in bfloat16 (autocast); weights, batch norm statistics, softmax, losses and
        the sums of alpha's and beta's gradients stay float32
    channels_last: weights and activations in NHWC order
    graph: the training step as a captured CUDA graph
    compile: the student's forward pass by torch.compile
    sync_batch_norm: where several processes train, statistics over the whole batch
    """

    device: torch.device
    bf16: bool
    channels_last: bool
    graph: bool
    compile: bool
    sync_batch_norm: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: nn.Module) -> nn.Module:
        """`model` on the device and in the memory format, in place; activations take the format of the weights."""
        return model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def place_frozen(self, model: nn.Module) -> nn.Module:
        """`place` for a network whose weights stay: what autocast would cast to bfloat16 at every call is cast once."""
        for module in self.place(model).modules():
            if self.bf16 and isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward passes and losses. Casts are not kept: a captured step's would be stale outside it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)


@dataclass(frozen=True)
class ComputeRecipe:
    """What `Compute` is made of; "auto" is decided by the device.

    precision: "bf16" autocast or "fp32"; auto is bf16 on CUDA and fp32 on the CPU
    channels_last: auto is true: on the CPU too it was the faster one of the two (docs/training.md)
    graph: auto is true on CUDA for one process; on the CPU and for several there is none, and true is refused
    compile: torch.compile of the student's forward pass, in one process
    sync_batch_norm: of several processes, statistics over the whole batch, so that N compute what one does; without it
        over each one's share, as if the batch were that small
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    graph: Literal["auto"] | bool = "auto"
    compile: bool = False
    sync_batch_norm: bool = True

    def on(self, device: torch.device, processes: int = 1) -> Compute:
        """What this recipe does on `device`, in one of `processes` that train together.

        Raises RecipeError: a captured graph is wanted where there is none, compilation in one of several.
        """
        cuda, alone = device.type == "cuda", processes == 1
        where = f"on {device}" if alone else f"for {processes} processes"
        can_capture = cuda and alone  # collectives in a capture want settings of NCCL that nobody could test here
        require(can_capture or self.graph is not True, f'compute.graph: wanted "auto" or false {where}, got true')
        require(alone or not self.compile, f"compute.compile: wanted false {where}, got true")
        return Compute(
            device,
            bf16=cuda if self.precision == "auto" else self.precision == "bf16",
            channels_last=self.channels_last is not False,
            graph=can_capture if self.graph == "auto" else self.graph,
            compile=self.compile,
            sync_batch_norm=self.sync_batch_norm,
        )
