"""Real numbers as integers of Z_2^64: rounding encoder and exact decoder.

CrypTen's own encoder truncates (a bias of half a unit on every weight, which flips prototype gates near 0) and its
decoder is off by exactly -1.0 for negatives just above an integer (`decode(-327677)` at 16 bits gives -5.99995).
Neither is used.
"""

import torch
from torch import Tensor

from deepshare.secure.errors import SecureError

# Local truncation wraps with probability |v| / 2^64: below 1e-3 a ResNet18 inference at 16 bits, about 10% at 20.
SCALE_BITS = 16
MAGNITUDE_BITS = 15  # products of two encoded values then stay below 2^62


def encode(values: Tensor, bits: int = SCALE_BITS, *, name: str = "values") -> Tensor:
    """round(values * 2^bits) as int64, ties to even.

    Args:
        values: real tensor of any shape.
        bits: fractional bits of the result.
        name: what the error calls the tensor.

    Raises:
        SecureError: a value is not finite, or not below 2^15 in magnitude.
    """
    exact = values.detach().double()
    if not bool(torch.isfinite(exact).all()):
        raise SecureError(f"secure: {name} must be finite (got NaN or inf)")
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if largest >= 2**MAGNITUDE_BITS:
        raise SecureError(f"secure: {name} must be below 2^{MAGNITUDE_BITS} in magnitude (got {largest:g})")
    return (exact * 2.0**bits).round().to(torch.int64).contiguous()


def decode(integers: Tensor, bits: int = SCALE_BITS) -> Tensor:
    """integers / 2^bits as float64: exact below 2^53."""
    return integers.double() / 2.0**bits
