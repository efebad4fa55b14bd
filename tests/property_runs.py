"""How the property tests run their cases, and what having the same bits means."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operator_cases import backend_parameters, device_of
from torch import Tensor

COMPILED_BACKENDS = backend_parameters()
BACKENDS = [pytest.param("reference"), *COMPILED_BACKENDS]
QUIET = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy under Triton's interpreter
MANY = 10_000


def interpreted(backend: str) -> bool:
    return backend == "triton" and device_of(backend) == "cpu"


def hold(backend: str, cases: st.SearchStrategy, check: Callable[..., None], count: int, shrink: bool = True) -> None:
    """`check(case, backend)` for `count` drawn cases: the same ones in every run of CI and of the default suite.

    The variable PROPERTY_CASES bounds their number (scripts/sanitize: instrumented code is slow).
    """

    count = min(count, int(os.environ.get("PROPERTY_CASES", count)))

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < MANY or "CI" in os.environ,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases)
    def holds(case: object) -> None:
        check(case, backend)

    holds()


def largest(backend: str) -> int:
    """Elements of a drawn tensor: the interpreter takes milliseconds a program."""
    return 120 if interpreted(backend) else 2000


def bits_of(tensor: Tensor) -> Tensor:
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(views[tensor.element_size()])


def assert_same_bits(one: Tensor | None, other: Tensor | None, name: str) -> None:
    assert (one is None) == (other is None), name
    if one is None or other is None:
        return
    both_nan = one.isnan() & other.isnan() if one.is_floating_point() else torch.zeros_like(one, dtype=torch.bool)
    assert bool(((bits_of(one) == bits_of(other)) | both_nan).all()), f"{name} has other bits"
