"""The integer network against the float model: same class, same accuracy, and which gates differ and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepshare.secure.emulate import (
    GateBits,
    Rounding,
    compared,
    emulate,
    gate_makers,
    untruncated,
    window_sum,
)
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS, decode, encode
from deepshare.secure.lower import lower
from deepshare.secure.program import Program
from deepshare.text_table import aligned

Encoding = Literal["round", "truncate"]


@dataclass(frozen=True)
class SiteGates:
    """Gates of one comparison, over all images, that differ from the float model's.

    Attributes:
        index, name: the step.
        gates: comparisons.
        flips: how many differ in the integer network as it runs, flips of earlier sites included.
        largest: largest |x| of the float model at one of them, in units of 1.0.
        own_flips: how many differ if every earlier gate is forced to the float model's: those that rounding makes.
        own_largest: largest |x| of the float model at one of these, in LSB of 2^-16.
        error: mean |x - float x| with the gates forced, in LSB.
    """

    index: int
    name: str
    gates: int
    flips: int
    largest: float
    own_flips: int
    own_largest: float
    error: float

    def cells(self) -> tuple[str, ...]:
        counts = (f"{self.gates:,}", f"{self.flips:,}", f"{self.largest:.3g}", f"{self.own_flips:,}")
        return (self.name, *counts, f"{self.own_largest:.0f}", f"{self.error:.2f}")


@dataclass(frozen=True)
class Agreement:
    """What `agreement` measured.

    Attributes:
        images; encoding, rounding, gate_bits: what it was measured with.
        agreement: share of images with the float model's argmax.
        double_agreement: the same for the network in float64: what no rounding to 16 bits is to blame for.
        accuracy_float, accuracy_integer: None without labels.
        margin: mean difference of the float model's two largest logits.
        error: mean |logit - float logit|.
        sites: every comparison, in order.
    """

    images: int
    encoding: Encoding
    rounding: Rounding
    gate_bits: GateBits
    agreement: float
    double_agreement: float
    accuracy_float: float | None
    accuracy_integer: float | None
    margin: float
    error: float
    sites: tuple[SiteGates, ...]

    @property
    def flips(self) -> int:
        return sum(site.flips for site in self.sites)

    @property
    def own_flips(self) -> int:
        return sum(site.own_flips for site in self.sites)

    @property
    def gates(self) -> int:
        return sum(site.gates for site in self.sites)

    def __str__(self) -> str:
        head = ("site", "gates", "flips", "largest |x|", "own flips", "largest |x|, LSB", "error, LSB")
        rows: list[tuple[str, ...]] = [head, ()]
        rows += [site.cells() for site in self.sites]
        accuracy = ""
        if self.accuracy_float is not None and self.accuracy_integer is not None:
            accuracy = f"; accuracy {self.accuracy_float:.2%} float, {self.accuracy_integer:.2%} integer"
        return (
            f"{aligned(rows, left=1)}\n{self.images} images, encoder {self.encoding}s, truncation {self.rounding}, "
            f"{self.gate_bits}-bit gates: argmax equal on {self.agreement:.1%} (float64 {self.double_agreement:.1%})"
            f"{accuracy}; margin {self.margin:.3g}, mean |logit error| {self.error:.2g}"
        )


def agreement(
    model: nn.Module,
    images: Tensor,  # float [N, C, H, W], normalised
    labels: Tensor | None = None,  # int64 [N]
    *,
    encoding: Encoding = "round",
    rounding: Rounding = "floor",
    gate_bits: GateBits = 64,
    batch: int = 16,
) -> Agreement:
    """Lowers `model`, emulates it, and compares with the model itself on the same images.

    The gates of the float model are those of the lowered network in float64, its weights not rounded.

    Args:
        encoding: "round" is `encode`; "truncate" drops what is below 2^-16 of weights and images, as CrypTen does.
        rounding, gate_bits: as `emulate` takes them.

    Raises:
        SecureError: no images, or as `lower`, `encode` and `emulate` raise.
    """
    if images.dim() != 4 or not len(images):
        raise SecureError(f"agreement: images must be [N, C, H, W] with N > 0 (got {list(images.shape)})")
    if encoding not in _ENCODERS:
        raise SecureError(f"agreement: encoding must be 'round' or 'truncate' (got {encoding!r})")
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    encoder = _ENCODERS[encoding]
    program, tensors = lower(model, shape, encoder=encoder)
    real = lower(model, shape, encoder=_keep)[1]
    counts = {index: _SiteCount() for index in gate_makers(program)}
    plain, doubles, integers = [], [], []
    with torch.no_grad():
        for part in images.split(batch):
            plain.append(model(part).double())
            reference = real_values(program, real, part.double())
            doubles.append(reference[-1])
            encoded = encoder(part, SCALE_BITS, name="images")
            integers.append(_emulate_part(program, tensors, encoded, reference, counts, rounding, gate_bits))
    sites = tuple(count.site(index, program.steps[index].name) for index, count in counts.items())
    logits = (torch.cat(plain), torch.cat(doubles), torch.cat(integers))
    return Agreement(len(images), encoding, rounding, gate_bits, **_compare(*logits, labels), sites=sites)


def real_values(program: Program, real: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """Every step's value in float64, weights as `lower(..., encoder=...)` leaves them if it rounds nothing."""
    values: dict[int, Tensor] = {}
    for index, step in enumerate(program.steps):
        if step.op == "input":
            values[index] = images
        elif step.op == "avg_pool2d":
            values[index] = window_sum(values[step.inputs[0]], step) / prod(step.options["kernel"])
        else:
            x = compared(program, step, values)
            values[index] = untruncated(program, real, step, values, None if x is None else x >= 0)[0]
    return list(values.values())


@dataclass
class _SiteCount:
    """Running sums of a SiteGates."""

    gates: int = 0
    flips: int = 0
    largest: float = 0.0
    own_flips: int = 0
    own_largest: float = 0.0
    error: float = 0.0

    def add(self, exact: Tensor, ran: Tensor, forced: Tensor, gate_bits: GateBits) -> None:
        """exact: the float model's x; ran, forced: the integer network's, with its own and with the model's gates."""
        opens = exact >= 0
        differ, own = _gates(ran, gate_bits) != opens, _gates(forced, gate_bits) != opens
        self.gates += opens.numel()
        self.flips += int(differ.sum())
        self.own_flips += int(own.sum())
        self.error += float((decode(forced) - exact).abs().sum()) * 2**SCALE_BITS
        self.largest = max([self.largest, *exact[differ].abs().tolist()])
        self.own_largest = max([self.own_largest, *(exact[own].abs() * 2**SCALE_BITS).tolist()])

    def site(self, index: int, name: str) -> SiteGates:
        error = self.error / max(self.gates, 1)
        return SiteGates(index, name, self.gates, self.flips, self.largest, self.own_flips, self.own_largest, error)


def _emulate_part(
    program: Program,
    tensors: dict[str, Tensor],
    images: Tensor,
    reference: list[Tensor],
    counts: dict[int, _SiteCount],
    rounding: Rounding,
    gate_bits: GateBits,
) -> Tensor:
    """Decoded logits of one batch; the sites' counts grow."""
    exact = {index: _compared(program, index, reference) for index in counts}
    ran = emulate(program, tensors, images, rounding=rounding, gate_bits=gate_bits, keep=True)
    held = {index: x >= 0 for index, x in exact.items()}
    forced = emulate(program, tensors, images, rounding=rounding, gates=held, keep=True)
    assert ran.values is not None
    assert forced.values is not None
    for index, count in counts.items():
        own = _compared(program, index, forced.values)
        count.add(exact[index], _compared(program, index, ran.values), own, gate_bits)
    return decode(ran.result)


def _compared(program: Program, index: int, values: "list[Tensor] | tuple[Tensor, ...]") -> Tensor:
    x = compared(program, program.steps[index], dict(enumerate(values)))
    assert x is not None  # a maker compares
    return x


def _gates(x: Tensor, gate_bits: GateBits) -> Tensor:
    return x >= 0 if gate_bits == 64 else x & (1 << 31) == 0


def _compare(plain: Tensor, doubles: Tensor, integers: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The fields of Agreement that logits [N, classes] decide."""
    chosen = plain.argmax(1)
    top = plain.topk(min(2, plain.shape[1]), 1).values
    return {
        "agreement": _share(integers.argmax(1) == chosen),
        "double_agreement": _share(doubles.argmax(1) == chosen),
        "accuracy_float": None if labels is None else _share(chosen == labels),
        "accuracy_integer": None if labels is None else _share(integers.argmax(1) == labels),
        "margin": float((top[:, 0] - top[:, -1]).mean()),
        "error": float((integers - plain).abs().mean()),
    }


def _share(equal: Tensor) -> float:
    return float(equal.double().mean())


def _keep(values: Tensor, bits: int, *, name: str) -> Tensor:
    return values.detach().double()


def _truncating(values: Tensor, bits: int, *, name: str) -> Tensor:
    encode(values, bits, name=name)  # for its checks
    return (values.detach().double() * 2.0**bits).to(torch.int64).contiguous()


_ENCODERS: dict[str, Callable[..., Tensor]] = {"round": encode, "truncate": _truncating}
