"""The operators once more, in float64 numpy and Python integers, from the equations of docs/shared_relu.md and of
section 3 of docs/design.md alone: nothing here was taken from a kernel or from kernels/reference.py.

Hard gates leave no room: y and dx are two roundings in a fixed order, so the oracle gives their very bits. Soft gates
and sums come with a bound, element by element, derived in `Wide`. What the order of additions decides (sums that may
overflow on their way, an infinity times a soft gate that underflows) is marked free.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
_LAMBDA = 6.0  # failure probability 2 exp(-18) a sum (Higham and Mary 2019, theorem 2.4)
_HIGHER_ORDER = 1.01  # products of errors, of which each is below 2^-7


@dataclass(frozen=True)
class Wide:
    """The accumulation dtype's numbers: u, half the spacing at 1; the smallest subnormal; the largest finite value.

    `sides` counts who rounds: float64 accumulation is compared with an oracle that is float64 itself.
    A soft gate is within 4 * 2u a side (tests/operator_cases.py, `bounds`, derives it; so is the density).
    """

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2 * self.sides * _HIGHER_ORDER

    @property
    def sides(self) -> int:
        return 2 if self.dtype == torch.float64 else 1

    @property
    def gate_error(self) -> float:
        return 8 * self.unit

    @property
    def tiny(self) -> float:
        return torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    def summing(self, count: int) -> float:
        """Of the sum of |terms|: the error of adding `count` terms in any order."""
        return min(count, _LAMBDA * math.sqrt(count)) * self.unit


def accumulation(dtype: torch.dtype) -> Wide:
    return Wide(torch.float64 if dtype == torch.float64 else torch.float32)


@dataclass
class Expected:
    """A result: its value, how far from it an implementation may be, and where anything may stand."""

    value: Array
    error: Array
    free: Mask

    def misses(self, got: Array) -> Mask:
        """Where `got` is wrong; zeros count with their sign where there is no error to allow."""
        with np.errstate(all="ignore"):
            same = (got == self.value) & ((np.signbit(got) == np.signbit(self.value)) | (self.error > 0))
            near = np.abs(got - self.value) <= self.error
        return ~(same | near | (np.isnan(got) & np.isnan(self.value)) | self.free)


def exact(value: Array) -> Expected:
    return Expected(value, np.zeros_like(value), np.zeros(value.shape, bool))


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def rounded(values: Array, dtype: torch.dtype, to_nearest: Callable[[Array], Array] = np.rint) -> Array:
    """The nearest numbers of `dtype`, ties to even, subnormals and overflow as IEEE 754 has them.

    A float64 sum or product of two numbers of `dtype` (24 bits or fewer) may be rounded twice: 53 >= 2 * 24 + 2.
    """
    info = torch.finfo(dtype)
    if info.bits == 64:
        return values
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(values)[1] - 1, round(math.log2(info.smallest_normal)))
        digits = exponent + round(math.log2(info.eps))  # the exponent of the last place kept
        nearest = np.ldexp(to_nearest(np.ldexp(values, -digits)), digits)
        nearest = np.where(np.abs(nearest) > info.max, np.copysign(np.inf, values), nearest)
    return np.where(np.isfinite(values), nearest, values)


def per_channel(vector: Array, rank: int) -> Array:
    return np.asarray(vector).reshape((1, -1) + (1,) * (rank - 2))


_erfc = np.frompyfunc(math.erfc, 1, 1)


def normal_cdf(t: Array) -> Array:
    return 0.5 * np.asarray(_erfc(-t / math.sqrt(2)), np.float64)


def normal_density(t: Array) -> Array:
    return np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


@dataclass
class SharedReLU:
    """One call: operands as float64 arrays [N, C, *S], alpha and beta [C] as the kernels get them.

    `hard_gates` [N, >=P, *S] stand for packed gates; `band`: values nearer to 0 than this, 0 itself excepted, may be
    taken for 0 (a device that flushes subnormals), so what hangs on them is free.
    """

    x: Array
    pi: NDArray[np.int64]
    alpha: Array
    beta: Array
    dtype: torch.dtype
    residual: Array | None = None
    source: Array | None = None
    hard_gates: Mask | None = None
    soft: int = 0
    gamma: float = 1.0
    prototypes: int = 1
    band: float = 0.0
    extra_units: float = 0.0  # of a 16-bit rounding: 1 where results are truncated instead of rounded
    truncated_sum: bool = False  # x + residual is
    wide: Wide = field(init=False)

    def __post_init__(self) -> None:
        self.wide = accumulation(self.dtype)
        with np.errstate(all="ignore"):
            self.z = self.x
            if self.residual is not None:
                total = rounded(self.x + self.residual, self.wide.dtype)
                self.z = rounded(total, self.dtype, np.trunc if self.truncated_sum else np.rint)
            self._gates()

    def _gates(self) -> None:
        rank = self.x.ndim
        self.is_soft = per_channel(np.arange(len(self.pi)) < self.soft, rank)
        alpha, beta = per_channel(self.alpha, rank), per_channel(self.beta, rank)
        if self.hard_gates is not None:
            self.v = np.where(self.hard_gates, 1.0, -1.0)[:, self.pi]
        else:
            self.v = (self.z if self.source is None else self.source)[:, self.pi]
        hard = (self.v >= 0).astype(np.float64)
        self.gate = np.where(self.is_soft, normal_cdf(self.gamma * self.v), hard)
        self.factor = np.where(self.is_soft, alpha * self.gate + beta, rounded(alpha * hard + beta, self.wide.dtype))
        size = np.abs(alpha) * self.gate + np.abs(beta)
        error = np.abs(alpha) * self.wide.gate_error + 2 * self.wide.unit * size
        self.factor_error = np.where(self.is_soft, error, 0.0)

    def leader_gates(self) -> Mask:
        """What the leader emits: hard gates of its own prototypes."""
        return self.z[:, : self.prototypes] >= 0

    def near_zero(self, values: Array) -> Mask:
        return (np.abs(values) < self.band) & (values != 0)

    def _times_factor(self, values: Array) -> Expected:
        """values * factor in the accumulation dtype, not yet in x's."""
        wide = self.wide
        with np.errstate(all="ignore"):
            product = values * self.factor
            value = np.where(self.is_soft, product, rounded(product, wide.dtype))
            error = np.abs(values) * self.factor_error + wide.unit * np.abs(product) + wide.tiny
        error = np.where(self.is_soft & np.isfinite(product), error, 0.0)
        undecided = self.is_soft & np.isinf(values) & ~(np.abs(self.factor) > self.factor_error)
        return Expected(value, error, undecided | self.near_zero(values) | (self.near_zero(self.v) & ~self.is_soft))

    def _stored(self, wide: Expected) -> Expected:
        """A result in x's dtype: bits where it is exact, else one rounding more."""
        info = torch.finfo(self.dtype)
        value = rounded(wide.value, self.dtype)
        with np.errstate(all="ignore"):
            unit = info.eps / 2 * (np.abs(wide.value) + wide.error) + info.smallest_normal * info.eps / 2
            loose = (wide.error > 0) | (self.extra_units > 0)
            narrow = np.where(loose & (info.bits == 16), (1 + self.extra_units) * unit, 0.0)
            narrow = narrow + self.band  # a subnormal result may be anything that is none
            error = np.where(np.isfinite(wide.value), wide.error + narrow, 0.0)
            overflow = (error > 0) & np.isfinite(wide.value) & (np.abs(wide.value) + error >= info.max)
        return Expected(np.where(error > 0, wide.value, value), error, wide.free | overflow)

    def y(self) -> Expected:
        return self._stored(self._times_factor(self.z))

    def gradients(self, grad: Array) -> dict[str, Expected]:
        """dx (residual's too), dsource where one is owed, dalpha and dbeta, these in the accumulation dtype."""
        with np.errstate(all="ignore"):
            dx = self._times_factor(grad)
            found = {"dalpha": self._sum(grad, self.gate), "dbeta": self._sum(grad, None)}
            if self.soft > 0:
                flow = self._flow(grad)
                if self.source is not None:
                    found["dsource"] = self._stored(flow)
                else:
                    dx = self._added(dx, flow)
            return {"dx": self._stored(dx), **found}

    def _added(self, dx: Expected, flow: Expected) -> Expected:
        """dx plus what flowed through the soft gates into the prototypes; channels that got nothing keep their bits."""
        reached = per_channel(np.isin(np.arange(dx.value.shape[1]), self.pi[: self.soft]), dx.value.ndim)
        total = dx.value + flow.value
        error = dx.error + flow.error + self.wide.unit * (np.abs(total) + np.abs(dx.value)) + self.wide.tiny
        large = (np.isfinite(part) & (np.abs(part) >= self.wide.largest / 4) for part in (dx.value, flow.value))
        risky = np.logical_or(*large)  # on its way to infinity
        return Expected(
            np.where(reached, total, dx.value),
            np.where(reached & np.isfinite(total), error, dx.error),
            dx.free | (reached & (flow.free | risky)),
        )

    def _sum(self, grad: Array, gate: Array | None) -> Expected:
        """sum over n, s of grad * z (* gate)."""
        wide, positions = self.wide, tuple(d for d in range(grad.ndim) if d != 1)
        product = grad * self.z
        terms = product if gate is None else product * gate
        count = terms.size // max(terms.shape[1], 1)
        size = np.where(np.isfinite(grad) & np.isfinite(self.z), np.abs(product), 0.0)
        scale = size if gate is None else size * np.abs(np.nan_to_num(gate))
        error = scale.sum(positions) * (wide.summing(count) + 2 * wide.unit) + 2 * count * wide.tiny
        free = size.sum(positions) >= wide.largest / 4
        edge = self.near_zero(grad) | self.near_zero(self.z)
        if gate is not None:
            error = error + (size * self.is_soft).sum(positions) * wide.gate_error
            underflow = self.is_soft & np.isinf(product) & (gate < wide.gate_error)
            edge = edge | underflow | (self.near_zero(self.v) & ~self.is_soft)
        total = terms.sum(positions)
        return Expected(total, np.where(np.isfinite(total), error, 0.0), free | edge.any(positions))

    def _flow(self, grad: Array) -> Expected:
        """In channel p: sum over c < soft with pi[c] = p of grad * z[c] * alpha[c] * gamma * phi(gamma * source[p])."""
        wide, into = self.wide, self.z if self.source is None else self.source
        value, size, peak = np.zeros_like(into), np.zeros_like(into), np.zeros_like(into)
        edge = np.zeros(into.shape, bool)
        density = self.gamma * normal_density(self.gamma * into)
        for c in range(self.soft):
            p = int(self.pi[c])
            weight = grad[:, c] * self.z[:, c] * self.alpha[c]
            value[:, p] += weight * density[:, p]
            finite = np.isfinite(grad[:, c]) & np.isfinite(self.z[:, c])
            size[:, p] += np.where(finite, np.abs(weight), 0.0)
            peak[:, p] += np.where(finite, self._largest_product(grad[:, c], self.z[:, c], self.alpha[c]), 0.0)
            edge[:, p] |= ~finite & (np.abs(density[:, p]) <= abs(self.gamma) * wide.gate_error)
            edge[:, p] |= self.near_zero(grad[:, c]) | self.near_zero(self.z[:, c])
        members = int(np.bincount(self.pi[: self.soft], minlength=1).max())
        scale = abs(self.gamma) * size
        error = scale * (wide.gate_error + 0.4 * (wide.summing(members) + 4 * wide.unit)) + 4 * members * wide.tiny
        reached = size.sum(tuple(d for d in range(into.ndim) if d != 1)) >= 0
        reached &= np.isin(np.arange(into.shape[1]), self.pi[: self.soft])
        error = np.where(per_channel(reached, into.ndim) & np.isfinite(value), error, 0.0)
        return Expected(value, error, edge | (peak >= wide.largest / 4))

    def _largest_product(self, *factors: Any) -> Array:
        """Of any partial product of the factors and gamma: what an order of multiplications may come to."""
        sizes = [np.maximum(1.0, np.abs(factor)) for factor in (*factors, self.gamma)]
        return np.asarray(math.prod(sizes), np.float64)


@dataclass
class MaskedReLU:
    """SNL's masked_relu with a mask per pixel: x [N, C, *S], mask [C, *S] as the kernels get it."""

    x: Array
    mask: Array
    dtype: torch.dtype

    def _stored(self, values: Array) -> Expected:
        with np.errstate(all="ignore"):
            wide = accumulation(self.dtype).dtype
            weight = np.where(self.x >= 0, 1.0, rounded(1 - self.mask, wide))
            return exact(rounded(rounded(values * weight, wide), self.dtype))

    def y(self) -> Expected:
        return self._stored(self.x)

    def gradients(self, grad: Array) -> tuple[Expected, Expected]:
        """(dx, dmask), dmask in the accumulation dtype."""
        wide = accumulation(self.dtype)
        with np.errstate(all="ignore"):
            terms = np.where(self.x >= 0, 0.0, grad * self.x)
            size = np.where(np.isfinite(grad) & np.isfinite(self.x), np.abs(terms), 0.0).sum(0)
            total, count = -terms.sum(0), len(terms)
            error = size * (wide.summing(count) + wide.unit) + count * wide.tiny
        return self._stored(grad), Expected(total, np.where(np.isfinite(total), error, 0.0), size >= wide.largest / 4)


def packed(gates: Mask, strides: tuple[int, ...]) -> NDArray[np.uint8]:
    """Gates [N, P, *S] as bits in the memory order that the strides of a dense [N, C, *S] say (design, section 3)."""
    order = sorted(range(gates.ndim), key=lambda d: (-strides[d], d))
    stored, at = gates.transpose(order), order.index(1)
    outer, inner = math.prod(stored.shape[:at]), math.prod(stored.shape[at + 1 :])
    shape = (outer, gates.shape[1]) if inner == 1 else (outer, gates.shape[1], inner)
    return np.packbits(stored.reshape(shape), axis=-1, bitorder="little")


def signed(value: int) -> int:
    """`value` modulo 2^64, as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


@dataclass
class Share:
    """One party's share: int64 arrays of Python integers; gates bool [N, >=P, *S]."""

    opened: NDArray[np.object_]
    gates: Mask
    pi: NDArray[np.int64]
    alpha: list[int]
    beta: list[int]
    flip: NDArray[np.object_]
    offset: NDArray[np.object_]
    toggle: NDArray[np.object_]
    scale: list[int] | None
    shift: int
    party: int

    def y(self) -> NDArray[np.int64]:
        out = np.zeros(self.opened.shape, np.int64)
        for at in np.ndindex(self.opened.shape):
            out[at] = self._element(at)
        return out

    def _element(self, at: tuple[int, ...]) -> int:
        n, c, *s = at
        leader = (n, int(self.pi[c]), *s)
        z = int(self.gates[leader])
        flip = int(self.flip[at]) if self.scale is None else self.scale[c] * int(self.flip[leader])
        factor = self.beta[c] + flip + z * (self.alpha[c] - 2 * flip)
        value = signed(int(self.opened[at]) * factor + int(self.offset[at]) + z * int(self.toggle[at]))
        return value >> self.shift if self.party == 0 else signed(-(signed(-value) >> self.shift))
