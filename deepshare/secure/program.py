"""A network as a list of steps on shares: what both parties know.

A Program holds the architecture only: operations, shapes, channel maps and masks (the plan is public). Weights stand
apart, as integer tensors under the keys of `Program.params`, so that a party can be given the one without the other.
"""

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from torch import Tensor

# No message and, but for avg_pool2d's division, exact.
LOCAL_OPS = ("add", "sub", "gather", "reshape", "narrow", "concat", "avg_pool2d", "constant")


@dataclass(frozen=True)
class Param:
    """Shape and fractional bits of one weight tensor."""

    shape: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class Step:
    """One operation. `inputs` are indices of earlier steps; `shape` is the result's, without the batch dimension.

    Attributes:
        op: input, conv2d, linear, affine, relu, shared, mask; select, x times gathered gates; and, which each party
            does to its own share alone (LOCAL_OPS): add and sub of two results; gather, elements by their flat index
            into one image; reshape to [N, *shape]; narrow, some channels; concat along the channels; avg_pool2d;
            constant, known to both.
        name: module path or node name, as in the model.
        params: role (weight, bias, scale, shift, alpha, beta) to key in `Program.params`.
        public: role (pi, index, value) to key in `Program.public`.
        gates: for `shared` and `select`, (step whose value is compared, P). Equal `gates` share one comparison.
        fresh: for `shared`, True where this step makes the comparison, False for a follower.
        options: what the operation needs besides (stride, padding, kernel, ...); the result's shape is `shape`.
    """

    op: str
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    params: dict[str, str] = field(default_factory=dict)
    public: dict[str, str] = field(default_factory=dict)
    gates: tuple[int, int] | None = None
    fresh: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Elements of the result for one image."""
        return prod(self.shape)


@dataclass(frozen=True)
class Program:
    """Steps in order, the last one's value being the result: logits, or with label.py the index of the largest."""

    steps: tuple[Step, ...]
    params: dict[str, Param]
    public: dict[str, Tensor]  # int64: channel maps [C]; flat indices of masked [K] and of gathered elements [elements]
    reveals: str = "logits"  # or "label"

    def drelus(self, step: Step) -> int:
        """Comparisons the step makes for one image. A max pooling's count too, as relu steps; no plan lists them."""
        if step.op == "relu":
            return step.elements
        if step.op == "mask":
            return self.public[step.public["index"]].numel()
        if step.op in ("shared", "select") and step.fresh and step.gates is not None:
            return step.gates[1] * prod(step.shape[1:])
        return 0

    @property
    def total_drelus(self) -> int:
        return sum(self.drelus(step) for step in self.steps)

    def to_plain(self) -> dict[str, Any]:
        """Only dicts, tuples, numbers, strings and tensors: what `torch.load(weights_only=True)` reads back."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "params": {key: (param.shape, param.bits) for key, param in self.params.items()},
            "public": dict(self.public),
            "reveals": self.reveals,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Program":
        return cls(
            steps=tuple(Step(**step) for step in plain["steps"]),
            params={key: Param(tuple(shape), bits) for key, (shape, bits) in plain["params"].items()},
            public=dict(plain["public"]),
            reveals=plain["reveals"],
        )
