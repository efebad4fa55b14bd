"""How large a network's values grow: whether 32-bit gates are safe, and how seldom local truncation is wrong."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from deepshare.files import write_whole
from deepshare.secure.emulate import Emulation, GateBits, compared, emulate, gate_makers, untruncated
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Program
from deepshare.text_table import aligned

# Against 100 calibration images, the largest |x| of other images was up to 1.5 times as large at a site, and of inputs
# sought to make it large, with pixels in range, 3.5 times (docs/exactness.md). 8 is three of the 15 bits.
MARGIN = 8
GATE_LIMIT = 2**15  # 32-bit gates are right while |x| < 2^31 LSB


@dataclass(frozen=True)
class SiteRange:
    """One comparison: largest |x| in units of 1.0, and the bits that |x| takes with its 16 fractional ones."""

    index: int
    name: str
    op: str
    largest: float
    bits: int


@dataclass(frozen=True)
class LayerRange:
    """One truncation: largest |v| before it in bits of Z_2^64, and P(some v of one inference is truncated wrongly)."""

    index: int
    name: str
    op: str
    bits: int
    wrong: float


@dataclass(frozen=True)
class Ranges:
    """What `calibrate` measured.

    Attributes:
        sites: every comparison, in order.
        layers: every truncation, in order.
        images: how many were run.
        fingerprint: of program and weights (`fingerprint`).
    """

    sites: tuple[SiteRange, ...]
    layers: tuple[LayerRange, ...]
    images: int
    fingerprint: str

    @property
    def gate_bits(self) -> GateBits:
        """32 if every compared value stays below 2^15 with the margin, else 64."""
        return 64 if any(_too_large(site) for site in self.sites) else 32

    @property
    def nearest(self) -> SiteRange | None:
        """The comparison that comes nearest to the bound; None if nothing is compared."""
        return max(self.sites, key=lambda site: site.largest, default=None)

    @property
    def wrong(self) -> float:
        """Bound on the probability that local truncation is wrong anywhere in one inference: |v| / 2^64, summed."""
        return sum(layer.wrong for layer in self.layers)

    def check(
        self, gate_bits: int, program: Program | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Refuses gates that are too narrow for a site, and ranges of another network if one is given.

        Raises:
            SecureError: naming the site, its largest |x|, and the bound; or that the ranges are not the network's.
        """
        if gate_bits not in (32, 64):
            raise SecureError(f"calibrate: gate_bits must be 32 or 64 (got {gate_bits!r})")
        if program is not None and tensors is not None and fingerprint(program, tensors) != self.fingerprint:
            raise SecureError("calibrate: these ranges were measured on another network or other weights: measure anew")
        nearest = self.nearest
        if gate_bits == 32 and nearest is not None and _too_large(nearest):
            raise SecureError(
                f"calibrate: gate_bits must be 64: '{nearest.name}' compares values up to {nearest.largest:g}, "
                f"32 bits need {MARGIN} times that to be below {GATE_LIMIT}"
            )

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "gate_bits": self.gate_bits, "margin": MARGIN}, indent=2)

    def save(self, path: Path | str) -> Path:
        """Writes the JSON, whole or not at all. It tells how large the model's activations are: it stays with it."""
        return write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Ranges":
        """Reads what `save` wrote.

        Raises:
            SecureError: the file is missing, or is no such file.
        """
        try:
            plain = json.loads(Path(path).read_text())
            sites = tuple(SiteRange(**{**site, "largest": _size(site["largest"])}) for site in plain["sites"])
            layers = tuple(LayerRange(**{**layer, "wrong": _size(layer["wrong"])}) for layer in plain["layers"])
            return cls(sites, layers, int(plain["images"]), str(plain["fingerprint"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SecureError(f"calibrate: {path} must be a file of ranges ({type(error).__name__})") from error

    def __str__(self) -> str:
        rows = [("site", "kind", "largest |x|", "bits"), ()]
        rows += [(site.name, site.op, f"{site.largest:.4g}", str(site.bits)) for site in self.sites]
        summary = f"{self.images} images: gates of {self.gate_bits} bits"
        if self.nearest is not None:
            factor = GATE_LIMIT / max(self.nearest.largest, 2.0**-SCALE_BITS)
            summary += f"; nearest to the bound is '{self.nearest.name}', {factor:.4g} times below it"
        return f"{aligned(rows, left=2)}\n{summary}; P(a truncation wrong in one inference) <= {self.wrong:.2g}"


def calibrate(
    program: Program,
    tensors: Mapping[str, Tensor],
    images: Tensor,  # int64 [N, *input shape], 16 fractional bits
    *,
    batch: int = 16,
) -> Ranges:
    """Runs the emulation on images and keeps the largest |x| of every comparison and |v| before every truncation.

    |v| is computed in float64 from the same integers, so that a value beyond 2^63 shows and does not wrap around.

    Raises:
        SecureError: no images, or as `emulate` raises; a value that left Z_2^64, named.
    """
    if not len(images):
        raise SecureError("calibrate: images must be at least one (got none)")
    largest: dict[int, int] = dict.fromkeys(gate_makers(program), 0)
    before: dict[int, tuple[float, float]] = {}  # largest |v|, sum of |v| / 2^64
    real = {key: tensor.double() for key, tensor in tensors.items()}
    for part in images.split(batch):
        run = emulate(program, tensors, part, keep=True)
        for index in largest:
            x = compared(program, program.steps[index], _values(run))
            largest[index] = max(largest[index], int(x.abs().max()) if x is not None and x.numel() else 0)
        for index, magnitudes in _before_truncation(program, real, run):
            top, summed = before.get(index, (0.0, 0.0))
            before[index] = (max(top, float(magnitudes.max())), summed + float((magnitudes / 2.0**64).sum()))
    sites = tuple(_site(program, index, units) for index, units in largest.items())
    layers = tuple(_layer(program, index, top, summed / len(images)) for index, (top, summed) in before.items())
    return Ranges(sites, layers, len(images), fingerprint(program, tensors))


def fingerprint(program: Program, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of steps, channel maps, masks and weights, as hex: who holds it can confirm a guess of the weights."""
    digest = hashlib.sha256(json.dumps([asdict(step) for step in program.steps], sort_keys=True).encode())
    for name, tensor in sorted([*program.public.items(), *tensors.items()]):
        digest.update(f"|{name}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _before_truncation(program: Program, real: Mapping[str, Tensor], run: Emulation) -> list[tuple[int, Tensor]]:
    """(step, |v|) of every truncation of one emulated batch; a step that no longer fits Z_2^64 is refused."""
    values, found = _values(run), []
    for index, step in enumerate(program.steps):
        if not step.inputs:
            continue
        reads = {at: values[at].double() for at in step.inputs}
        x = compared(program, step, values)
        wide, bits = untruncated(program, real, step, reads, None if x is None else x >= 0)
        magnitudes = wide.abs()
        if magnitudes.numel() and float(magnitudes.max()) >= 2.0**63:
            raise SecureError(
                f"calibrate: '{step.name}' ({step.op}) reaches 2^63 before its truncation: it wraps around"
            )
        if bits and magnitudes.numel():
            found.append((index, magnitudes))
    return found


def _values(run: Emulation) -> dict[int, Tensor]:
    assert run.values is not None
    return dict(enumerate(run.values))


def _size(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("must be a finite number, 0 or more")
    return float(value)


def _too_large(site: SiteRange) -> bool:
    return site.largest * MARGIN >= GATE_LIMIT


def _site(program: Program, index: int, units: int) -> SiteRange:
    step = program.steps[index]
    return SiteRange(index, step.name, step.op, units / 2.0**SCALE_BITS, units.bit_length())


def _layer(program: Program, index: int, top: float, wrong: float) -> LayerRange:
    step = program.steps[index]
    return LayerRange(index, step.name, step.op, int(top).bit_length(), wrong)
