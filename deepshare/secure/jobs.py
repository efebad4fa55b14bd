"""What a party is given and what it gives back: files in a folder of its own.

The server's folder never holds an image; with secret weights the client's never holds a weight.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepshare.secure.program import Program

Weights = Literal["public", "secret"]
JOB_FILE, RESULT_FILE = "job.pt", "result.pt"


@dataclass(frozen=True)
class Job:
    """One network and the images it is run on.

    Attributes:
        images: int64 fixed point [N, C, H, W], 16 fractional bits.
        tensors: the weights as integers, keys of `program.params`.
    """

    program: Program
    tensors: dict[str, Tensor]
    images: Tensor
    weights: Weights
    batch: int

    def view(self, rank: int) -> dict[str, Any]:
        """What party `rank` may know of this job (0 the server, 1 the client)."""
        known: dict[str, Any] = {
            "program": self.program.to_plain(),
            "secret": self.weights == "secret",
            "batch": self.batch,
            "count": len(self.images),
        }
        if rank == 0 or self.weights == "public":
            known["tensors"] = self.tensors
        if rank == 1:
            known["images"] = self.images
        return known


def save_beside(value: Any, path: Path) -> None:
    """torch.save under another name, then renamed: a reader sees all of it or nothing."""
    unfinished = path.with_suffix(".part")
    torch.save(value, unfinished)
    os.replace(unfinished, path)


def load(path: Path) -> Any:
    """Tensors and plain values only: no code is run."""
    return torch.load(path, weights_only=True)
