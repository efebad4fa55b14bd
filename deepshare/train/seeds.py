"""Random numbers that depend on where in the run they are drawn, never on what was drawn before: resume is exact."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *place: str | int) -> int:
    """A seed in 0 .. 2^62 - 1 for a place in the run, such as (seed, "gelu", 3)."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """PyTorch's CPU generator starts from `seed` inside, and is as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
