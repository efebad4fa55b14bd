"""Triton pieces that the kernels share: z, where a gate comes from, the gate, its slope, gates as bits.

Equations as in reference.py. All arithmetic is in float32, for float64 x in float64.
"""

import math

import triton
import triton.language as tl

INV_SQRT2 = tl.constexpr(1.0 / math.sqrt(2.0))
INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def widened(x):
    """x in the dtype of the arithmetic."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def load_z(x_ptr, residual_ptr, at, mask, CACHE: tl.constexpr = ""):
    """z = x, or x + residual rounded to x's dtype (the same bits as an addition of its own), widened."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0, cache_modifier=CACHE)
    if residual_ptr is None:
        return widened(x)
    else:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0, cache_modifier=CACHE)
        return widened((widened(x) + widened(residual)).to(x.dtype))


@triton.jit
def load_leader(x_ptr, residual_ptr, source_ptr, at, mask, CACHE: tl.constexpr = ""):
    """The value whose sign opens the gate: the source's, or z's own where there is none."""
    if source_ptr is None:
        return load_z(x_ptr, residual_ptr, at, mask, CACHE)
    else:
        return widened(tl.load(source_ptr + at, mask=mask, other=0.0, cache_modifier=CACHE))


@triton.jit
def gate_of(s, is_soft, gamma, SOFT: tl.constexpr):
    """1[s >= 0], or Phi(gamma * s) where is_soft; NaN gives 0 and NaN."""
    gate = tl.where(s >= 0.0, 1.0, 0.0).to(s.dtype)
    if SOFT:
        gate = tl.where(is_soft, 0.5 * (1.0 + tl.math.erf(gamma * s * INV_SQRT2)), gate)
    return gate


@triton.jit
def gate_slope(s, gamma):
    """d Phi(gamma * s) / d s = gamma * phi(gamma * s)."""
    z = gamma * s
    return gamma * (tl.exp(-0.5 * z * z) * INV_SQRT_2PI)


@triton.jit
def soft_state(soft_ptr, gamma_ptr):
    """(soft_channels, gamma), read on the device so that a captured graph sees their present values."""
    if soft_ptr is None:
        return 0, 1.0
    else:
        return tl.load(soft_ptr), tl.load(gamma_ptr)


@triton.jit
def load_bit(gates_ptr, byte_at, shift, mask):
    """One packed gate (packing.py) a lane, as int32. Neighbouring lanes share a byte, which L1 hands to all of them."""
    byte = tl.load(gates_ptr + byte_at, mask=mask, other=0)
    return (byte.to(tl.int32) >> shift) & 1


@triton.jit
def packed(opens, ROWS: tl.constexpr, COLS: tl.constexpr):
    """uint8 [ROWS, COLS / 8] of bool [ROWS, COLS]: column i is bit i % 8 of byte i // 8."""
    bits = tl.reshape(opens.to(tl.int32), [ROWS, COLS // 8, 8])
    weights = 1 << tl.arange(0, 8)
    return tl.sum(bits * weights[None, None, :], 2).to(tl.uint8)
