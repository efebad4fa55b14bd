"""What the functions of the two gate backends ask of their operands, checked once, at the public function."""

import torch
from torch import Tensor

BACKENDS = ("native", "reference")


def check_tensor(function: str, name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Passes a CPU tensor of this dtype and shape, None standing for any size.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another device or shape.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: {name} must be a {dtype} tensor (got {got})")
    if value.device.type != "cpu":
        raise ValueError(f"{function}: {name} must be on the CPU (got {value.device})")
    same = len(value.shape) == len(shape) and all(w in (None, g) for w, g in zip(shape, value.shape, strict=True))
    if not same:
        wanted = ", ".join("G" if size is None else str(size) for size in shape)
        raise ValueError(f"{function}: {name} must be [{wanted}] (got {list(value.shape)})")


def check_choice(function: str, name: str, value: int, choices: tuple[int, ...]) -> None:
    """Passes one of the ints.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise ValueError(f"{function}: {name} must be {' or '.join(map(str, choices))} (got {value!r})")


def is_native(function: str, backend: str | None, missing: str | None) -> bool:
    """Whether the native form runs: where it is asked for, or where nothing is and it can.

    Args:
        missing: why the native form cannot run here, or None.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the native one is asked for and cannot run; the message says why.
    """
    if backend is None:
        return missing is None
    if backend not in BACKENDS:
        raise ValueError(f"{function}: backend must be one of {', '.join(BACKENDS)} (got {backend!r})")
    if backend == "native" and missing is not None:
        raise RuntimeError(f"{function}: backend 'native' is not available: {missing}")
    return backend == "native"
