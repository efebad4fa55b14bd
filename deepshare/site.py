"""One activation site of a network: where it is, how large it is, and what stands there."""

import base64
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Kind = Literal["relu", "relu6", "gelu", "linear", "shared", "mask"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_IMAGE = 2**26  # values of one image; 3x4096x4096 fits. Counting runs the model on one
MAX_ELEMENTS = 2**40  # of one site: 4,096 channels of the largest image


class PlanError(ValueError):
    """A plan that is malformed, or does not fit the model it is applied to."""


@dataclass(frozen=True)
class Mask:
    """Which elements of a site keep their gate, as a value: packed bits, first element in the highest bit.

    Attributes:
        shape: the site's (C, H, W), or (C,) for a gate per channel.
        bits: ceil(numel / 8) bytes.
    """

    shape: tuple[int, ...]
    bits: bytes

    def __post_init__(self) -> None:
        _check_sizes("Mask", "shape", self.shape)
        numel = math.prod(self.shape)
        if not isinstance(self.bits, bytes) or len(self.bits) != -(-numel // 8):
            got = f"{len(self.bits)} bytes" if isinstance(self.bits, bytes) else type(self.bits).__name__
            raise PlanError(f"Mask: bits must be {-(-numel // 8)} bytes for shape {self.shape} (got {got})")
        if numel % 8 and self.bits[-1] & (0xFF >> numel % 8):
            raise PlanError(f"Mask: the bits after the last of {numel} elements must be 0")

    @classmethod
    def of(cls, mask: Tensor) -> "Mask":
        """From a bool tensor [C, H, W] or [C]."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise PlanError(f"Mask: mask must be a bool tensor (got {got})")
        if mask.is_meta:
            raise PlanError("Mask: mask must have values (it is on the meta device)")
        return cls(tuple(mask.shape), np.packbits(mask.detach().cpu().numpy()).tobytes())

    def tensor(self) -> Tensor:
        """The bool tensor again."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=math.prod(self.shape))
        return torch.from_numpy(flat.astype(bool).reshape(self.shape))

    @property
    def ones(self) -> int:
        return sum(byte.bit_count() for byte in self.bits)


@dataclass(frozen=True)
class Site:
    """What stands at one activation call of a forward pass.

    Attributes:
        name: the called module's path, `path@2` for its second call; `path:relu` for a functional ReLU called by the
            module at `path`.
        shape: (C, H, W) of the activation without the batch; (C,) behind a linear layer.
        kind: "relu"; "relu6" (min(relu(x), 6)); "gelu" (the teacher's); "linear" (no activation); "shared"
            (SharedReLU2d, DeepShare eq. 3 and 6); "mask" (SNL eq. 2).
        prototypes: P in 1..C, for a shared site with gates of its own.
        leader: name of the site whose gates a shared site takes (layer sharing).
        mask: for a mask site; a bool tensor is packed into a `Mask`.
        zero_out: for a mask site: what keeps no ReLU is 0 (SNL eq. 7), not passed on. It costs no DReLU either way.

    Raises:
        PlanError: a field is out of range, or belongs to another kind.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = "relu"
    prototypes: int | None = None
    leader: str | None = None
    mask: Mask | None = None
    zero_out: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"Site: name must be a non-empty string (got {self.name!r})")
        _check_sizes(f"site {self.name!r}", "shape", self.shape)
        if self.kind not in KINDS:
            raise PlanError(f"site {self.name!r}: kind must be one of {', '.join(KINDS)} (got {self.kind!r})")
        if isinstance(self.mask, Tensor):
            object.__setattr__(self, "mask", Mask.of(self.mask))
        self._check_fields()

    def _check_fields(self) -> None:
        here = f"site {self.name!r}"
        if self.kind == "shared":
            if (self.prototypes is None) == (self.leader is None):
                raise PlanError(f"{here}: a shared site has either prototypes or a leader (got {self._fields()})")
        elif self.prototypes is not None or self.leader is not None:
            raise PlanError(
                f"{here}: only a shared site has prototypes or a leader (got {self.kind!r}, {self._fields()})"
            )
        if (self.kind == "mask") != (self.mask is not None):
            raise PlanError(f"{here}: kind 'mask' has a mask, no other kind has one (got kind {self.kind!r})")
        if self.zero_out is not False and (self.zero_out is not True or self.mask is None):
            raise PlanError(f"{here}: zero_out must be true or false, and only a mask site has it (got {self.kind!r})")
        if self.prototypes is not None and not (_is_int(self.prototypes) and 1 <= self.prototypes <= self.shape[0]):
            raise PlanError(f"{here}: prototypes must be an int in 1..{self.shape[0]} (got {self.prototypes!r})")
        if self.leader is not None and not isinstance(self.leader, str):
            raise PlanError(f"{here}: leader must be a site's name (got {self.leader!r})")
        allowed = [shape for shape in (self.shape, self.shape[:1]) if len(shape) in (1, 3)]
        if self.mask is not None and self.mask.shape not in allowed:
            raise PlanError(f"{here}: mask must be {' or '.join(map(str, allowed))} (got {self.mask.shape})")

    def _fields(self) -> str:
        return f"prototypes {self.prototypes}, leader {self.leader}"

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def positions(self) -> int:
        """H*W: what one prototype channel costs, in DReLUs."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """C*H*W: what a ReLU here costs, in DReLUs."""
        return math.prod(self.shape)

    @property
    def drelus(self) -> int:
        """DReLUs paid per image. A GELU counts as the ReLU it stands for; so does a ReLU6, as in the papers (DeepShare
        Table 4: 85,262K is MobileNetV2's elements, each once), though its clip at 6 is a comparison more.
        """
        if self.kind in ("relu", "relu6", "gelu"):
            return self.size
        if self.prototypes is not None:
            return self.prototypes * self.positions
        if self.mask is not None:
            return self.mask.ones * (self.size // math.prod(self.mask.shape))
        return 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; fields that do not apply are left out."""
        fields: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "kind": self.kind}
        if self.prototypes is not None:
            fields["prototypes"] = self.prototypes
        if self.leader is not None:
            fields["leader"] = self.leader
        if self.mask is not None:
            bits = base64.b64encode(self.mask.bits).decode("ascii")
            fields["mask"] = {"shape": list(self.mask.shape), "bits": bits}
        if self.zero_out:
            fields["zero_out"] = True
        return fields

    @classmethod
    def from_dict(cls, fields: Any) -> "Site":
        """The inverse of `to_dict`. Raises PlanError naming the site and the field."""
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            raise PlanError(f"a site must be an object with a name (got {fields!r:.80})")
        here = f"site {fields['name']!r}"
        unknown = sorted(fields.keys() - {"name", "shape", "kind", "prototypes", "leader", "mask", "zero_out"})
        missing = sorted({"shape", "kind"} - fields.keys())
        if unknown or missing:
            what, field = ("unknown", unknown[0]) if unknown else ("missing", missing[0])
            raise PlanError(f"{here}: {what} field {field!r}")
        mask = _mask_from(here, fields["mask"]) if "mask" in fields else None
        shape = _tuple(here, "shape", fields["shape"])
        gates = (fields.get("prototypes"), fields.get("leader"), mask, fields.get("zero_out", False))
        return cls(fields["name"], shape, fields["kind"], *gates)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sizes(here: str, field: str, sizes: object) -> None:
    if not isinstance(sizes, tuple) or not sizes or not all(_is_int(size) and size >= 1 for size in sizes):
        raise PlanError(f"{here}: {field} must be a tuple of positive ints (got {sizes!r:.80})")
    if math.prod(sizes) > MAX_ELEMENTS:
        raise PlanError(f"{here}: {field} must have at most {MAX_ELEMENTS:,} elements (got {sizes!r:.80})")


def checked_image_size(here: str, size: Any) -> tuple[int, ...]:
    """`size` as a tuple. Raises PlanError unless it is positive ints whose product is at most MAX_IMAGE."""
    try:
        sizes = tuple(size)
    except TypeError:
        sizes = ()
    if not sizes or not all(type(side) is int and side >= 1 for side in sizes):
        raise PlanError(f"{here}: input_size must be positive ints, (C, H, W) (got {size!r:.80})")
    if math.prod(sizes) > MAX_IMAGE:
        raise PlanError(f"{here}: input_size must be at most {MAX_IMAGE:,} values an image (got {size!r:.80})")
    return sizes


def _tuple(here: str, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise PlanError(f"{here}: {field} must be a list of positive ints (got {value!r:.80})")
    return tuple(value)


def _mask_from(here: str, value: Any) -> Mask:
    if not isinstance(value, dict) or value.keys() != {"shape", "bits"} or not isinstance(value["bits"], str):
        raise PlanError(f"{here}: mask must be an object with shape and bits (got {value!r:.80})")
    try:
        bits = base64.b64decode(value["bits"], validate=True)
        return Mask(_tuple(here, "mask shape", value["shape"]), bits)
    except PlanError as error:
        raise PlanError(f"{here}: mask: {error}") from error
    except ValueError as error:  # binascii.Error, or a plain one for text beyond ASCII
        raise PlanError(f"{here}: mask bits are not base64 ({error})") from error
