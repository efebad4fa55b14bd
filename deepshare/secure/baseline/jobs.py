"""What a party is given and what it gives back: open files without a name, one of each kind a party.

The server's never hold an image; with secret weights the client's never hold a weight. Having no name, they are gone
from the disk with the last process that has them open, whatever kills it.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from deepshare.secure.program import Program

Weights = Literal["public", "secret"]
Provider = Literal["TFP", "TTP"]  # CrypTen's names: who makes the triples


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


def nameless(folder: Path) -> IO[bytes]:
    """An empty file on `folder`'s disk that has no name (O_TMPFILE)."""
    return tempfile.TemporaryFile(dir=folder)


def save(value: Any, file: IO[bytes]) -> None:
    torch.save(value, file)
    file.flush()


def load(file: IO[bytes]) -> Any:
    """What `save` wrote, from the start of the file. Tensors and plain values only: no code is run."""
    file.seek(0)
    return torch.load(file, weights_only=True)
