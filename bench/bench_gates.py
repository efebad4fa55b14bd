"""The local work of the secure engine's gate backends (docs/gates.md), native beside numpy, in one call each.

6,024 gates: a ResNet18 of the 6K budget, all sites together; 557,056: all its ReLUs.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from interleave import Call, per_call
from measure import Measure
from torch import Tensor

from deepshare.raw_ops import dcf_missing
from deepshare.secure.dealer import dcf_keys
from deepshare.secure.engine import carry, dcf

BITS = 64
SETTINGS = {"public_key": bytes(16), "bits": BITS - 1}
GATES = [pytest.param(6024, marks=pytest.mark.quick), 557_056]

pytestmark = pytest.mark.benchmark(timer=per_call)


def random_bytes(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def generation(gates: int) -> Callable[[str], Call]:
    alphas, roots = random_bytes(gates, 8).view(torch.int64)[:, 0].contiguous(), random_bytes(2, gates, 16)
    return lambda backend: lambda: dcf_keys.generate(alphas, *roots, **SETTINGS, backend=backend)


def evaluation(gates: int) -> Callable[[str], Call]:
    points, root = random_bytes(gates, 8).view(torch.int64)[:, 0].contiguous(), random_bytes(gates, 16)
    keys = random_bytes(gates, dcf.key_bytes(BITS - 1))
    return lambda backend: lambda: dcf.evaluate(keys, root, points, party=1, **SETTINGS, backend=backend)


def leaves(gates: int) -> Callable[[str], Call]:
    opened = random_bytes(gates, 8).view(torch.int64)[:, 0].contiguous()
    words = random_bytes(BITS // 4, 2 * gates).view(torch.int16)
    return lambda backend: lambda: carry.leaves(words, opened, bits=BITS, backend=backend)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    ("name", "made"), [("DCF generate", generation), ("DCF evaluate", evaluation), ("tree leaves", leaves)]
)
def test_gates(measure: Measure, name: str, made: Callable[[int], Callable[[str], Call]], gates: int):
    if dcf_missing() is not None:
        pytest.skip(f"native: {dcf_missing()}")
    by = made(gates)
    measure(
        by("native"),
        {"reference": by("reference")},
        kind="gates",
        name=name,
        provider="native",
        baseline="reference",
        ours=True,
        case=f"{gates:,} gates of {BITS} bits",
    )
