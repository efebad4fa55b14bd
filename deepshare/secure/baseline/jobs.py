"""What a party is given: the server never an image, with secret weights the client never a weight."""

from dataclasses import dataclass
from typing import Any, Literal

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
