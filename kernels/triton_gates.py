"""Triton pieces shared by the forward and backward kernels: the gate, its slope, and a channel's constants.

Equations as in reference.py. All arithmetic is in alpha's dtype (float32, or float64 for float64 x).
"""

import math

import triton
import triton.language as tl

INV_SQRT2 = tl.constexpr(1.0 / math.sqrt(2.0))
INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


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
def soft_state(soft_ptr, gamma_ptr, alpha_ptr, SOFT: tl.constexpr):
    """(soft_channels, gamma), read on the device so that a captured graph sees their present values."""
    if SOFT:
        return tl.load(soft_ptr), tl.load(gamma_ptr).to(alpha_ptr.dtype.element_ty)
    else:
        return 0, 1.0
