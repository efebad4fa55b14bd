"""The carry tree's local steps, and the comparison made of them and of the DCF, in the clear."""

import itertools
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from deepshare import raw_ops
from deepshare.secure.dealer import dcf_keys
from deepshare.secure.dealer.thermometer import thermometer
from deepshare.secure.engine import carry, dcf

WITHOUT_NATIVE = raw_ops.carry_missing() is not None and os.environ.get("DEEPSHARE_BUILD") != "require"
NATIVE = pytest.mark.skipif(WITHOUT_NATIVE, reason=raw_ops.carry_missing() or "runs")
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]


def words(values: list[int]) -> Tensor:
    """Integers mod 2^64 as int64."""
    return torch.from_numpy(np.array([value % 2**64 for value in values], dtype=np.uint64).view(np.int64))


def random_words(gates: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, gates, dtype=np.int64))


def edges(bits: int) -> list[int]:
    near = {s * 2**k + d for k in range(bits) for d in (-1, 0, 1) for s in (-1, 1)}
    return sorted({value % 2**bits for value in near | {0, 2**bits - 1}})


def combined(generate: Tensor, propagate: Tensor) -> Tensor:
    """The carry out of the highest block, by the tree of docs/engine.md, without masks."""
    while len(generate) > 1:
        (low, high), (low_p, high_p) = ((planes[0::2], planes[1::2]) for planes in (generate, propagate))
        generate, propagate = high ^ high_p & low, high_p & low_p
    return generate[0]


def tree_carry(opened: Tensor, masks: Tensor, bits: int, backend: str | None) -> Tensor:
    """uint8 [G]: leaves of both parties' xor shares of the thermometer words, added up, then combined."""
    codes = thermometer(masks, bits=bits)
    share = torch.from_numpy(np.random.default_rng(3).integers(-(2**15), 2**15, codes.shape, dtype=np.int16))
    parties = [carry.leaves(words, opened, bits=bits, backend=backend) for words in (share, codes ^ share)]
    generate, propagate = (first ^ second for first, second in zip(*parties, strict=True))
    return carry.unpack(combined(generate, propagate), len(opened))


def dcf_carry(opened: Tensor, masks: Tensor, bits: int, backend: str | None) -> Tensor:
    """uint8 [G]: [~e_low < a_low] on m - 1 bits."""
    generator, settings = np.random.default_rng(4), {"public_key": bytes(range(16)), "bits": bits - 1}
    roots = [torch.from_numpy(generator.integers(0, 256, (len(masks), 16), dtype=np.uint8)) for _ in range(2)]
    keys = dcf_keys.generate(masks, *roots, **settings, backend=backend)
    shares = [dcf.evaluate(keys, roots[i], ~opened, party=i, **settings, backend=backend) for i in range(2)]
    return carry.unpack(shares[0] ^ shares[1], len(masks))


def carries(opened: Tensor, masks: Tensor, bits: int) -> Tensor:
    """What they must give: the carry out of the low m - 1 bits of e + a."""
    low = (1 << (bits - 1)) - 1
    pairs = zip(opened.tolist(), masks.tolist(), strict=True)
    return torch.tensor([(e & low) + (a & low) >> (bits - 1) for e, a in pairs], dtype=torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [64, 32])
def test_the_tree_gives_the_carry_at_every_edge(bits: int, backend: str):
    near = edges(bits)[:: 3 if bits == 64 else 1]
    pairs = list(itertools.product(near, near)) + [(e, -e + d) for e in edges(bits) for d in (-2, -1, 0, 1)]
    opened, masks = (words(list(values)) for values in zip(*pairs, strict=True))
    assert torch.equal(tree_carry(opened, masks, bits, backend), carries(opened, masks, bits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("gates", [0, 1, 7, 8, 9, 63, 65, 129, 5000])
def test_the_tree_gives_random_carries(gates: int, bits: int, backend: str):
    opened, masks = random_words(gates, 1), random_words(gates, 2)
    near = torch.arange(gates) % 3 == 0
    opened[near] = -masks[near] - torch.arange(gates)[near] % 2
    assert torch.equal(tree_carry(opened, masks, bits, backend), carries(opened, masks, bits))


@pytest.mark.parametrize("block", range(16))
@pytest.mark.parametrize("digit", range(16))
def test_a_leaf_is_its_definition(block: int, digit: int):
    """In the second block from below, whose digit of e' may be anything."""
    codes = thermometer(words([block << 3 | 7]), bits=64)
    assert [int(codes[1]) >> t & 1 for t in range(16)] == [int(block >= t) for t in range(16)]
    generate, propagate = carry.leaves(codes, words([digit << 3]), bits=64)
    assert (int(generate[1]), int(propagate[1])) == (int(block + digit >= 16), int(block + digit == 15))
    assert (int(generate[0]), int(propagate[0])) == (0, 1)  # 7 << 1 and (0 << 1) | 1


@NATIVE
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("gates", [0, 1, 7, 8, 9, 63, 64, 65, 129, 20_001])
def test_native_leaves_are_those_of_python(gates: int, bits: int):
    generator = np.random.default_rng(gates)
    shares = torch.from_numpy(generator.integers(-(2**15), 2**15, (bits // 4, gates), dtype=np.int16))
    native, python = (
        carry.leaves(shares, random_words(gates, gates), bits=bits, backend=backend)
        for backend in ("native", "reference")
    )
    for ours, theirs in zip(native, python, strict=True):
        assert ours.shape == (bits // 4, (gates + 7) // 8)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_take_any_strides(backend: str):
    shares = torch.from_numpy(np.random.default_rng(1).integers(-(2**15), 2**15, (40, 16), dtype=np.int16))
    opened = random_words(80, 5)
    dense = carry.leaves(shares.T.contiguous(), opened[::2].contiguous(), bits=64, backend=backend)
    for ours, theirs in zip(carry.leaves(shares.T, opened[::2], bits=64, backend=backend), dense, strict=True):
        assert torch.equal(ours, theirs)


# --- the comparison of docs/engine.md: z = DReLU(x) ^ r


def values_to_compare(bits: int) -> Tensor:
    """0, +-1, powers of two and their neighbours, the ends of the range, each under many masks."""
    powers = {s * 2**k + d for k in range(bits - 1) for d in (-1, 0, 1) for s in (-1, 1)}
    inside = [x for x in powers | {0, 1, -1, 2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1)} if abs(x) < 2 ** (bits - 1)]
    return words(sorted(inside)).repeat(8)


def top_bit(values: Tensor, bits: int) -> Tensor:
    return (values >> (bits - 1) & 1).to(torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("carried", [tree_carry, dcf_carry])
@pytest.mark.parametrize("bits", [64, 32])
def test_the_comparison_is_exact(bits: int, carried, backend: str):
    x = values_to_compare(bits)
    masks = random_words(len(x), 7)
    masks[: len(x) // 8] = x[: len(x) // 8]  # e = 0
    masks[len(x) // 8 : len(x) // 4] = 0  # e = x
    opened = x - masks
    coins = torch.from_numpy(np.random.default_rng(8).integers(0, 2, (2, len(x)), dtype=np.uint8))
    r = coins[0] ^ coins[1] ^ top_bit(masks, bits) ^ 1
    z = top_bit(opened, bits) ^ carried(opened, masks, bits, backend) ^ coins[0] ^ coins[1]
    assert torch.equal(z, (x >= 0).to(torch.uint8) ^ r)


# --- packing and errors


@pytest.mark.parametrize("gates", [0, 1, 7, 8, 9, 129])
def test_packed_bits_come_back(gates: int):
    bits = torch.from_numpy(np.random.default_rng(9).integers(0, 2, (3, gates), dtype=np.uint8))
    packed = carry.pack(bits)
    assert packed.shape == (3, (gates + 7) // 8)
    assert torch.equal(packed, carry.pack(bits.bool()))
    assert torch.equal(carry.unpack(packed, gates), bits)
    for gate in range(gates):
        assert torch.equal(packed[:, gate // 8] >> gate % 8 & 1, bits[:, gate])
    assert gates % 8 == 0 or bool((packed[:, -1] >> gates % 8 == 0).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: carry.pack(torch.zeros(3)), TypeError, "carry.pack: bits must be a uint8 or bool CPU tensor"),
        (lambda: carry.unpack(torch.zeros(3), 8), TypeError, "carry.unpack: packed must be a uint8 CPU tensor"),
        (lambda: carry.unpack(torch.zeros(2).byte(), 17), ValueError, r"packed must be \[..., 3\] \(got \[2\]\)"),
        (
            lambda: carry.leaves(torch.zeros(16, 4).short(), torch.zeros(5).long(), bits=64),
            ValueError,
            r"carry.leaves: words must be \[16, 5\] \(got \[16, 4\]\)",
        ),
        (
            lambda: carry.leaves(torch.zeros(16, 5).short(), torch.zeros(5).long(), bits=32),
            ValueError,
            r"words must be \[8, 5\] \(got \[16, 5\]\)",
        ),
        (
            lambda: carry.leaves(torch.zeros(16, 5).int(), torch.zeros(5).long(), bits=64),
            TypeError,
            r"words must be a torch.int16 tensor \(got torch.int32\)",
        ),
        (
            lambda: carry.leaves(torch.zeros(12, 5).short(), torch.zeros(5).long(), bits=48),
            ValueError,
            r"carry.leaves: bits must be 32 or 64 \(got 48\)",
        ),
        (lambda: thermometer(torch.zeros(3), bits=64), TypeError, "thermometer: masks must be a torch.int64 tensor"),
        (lambda: thermometer(torch.zeros(3).long(), bits=63), ValueError, "thermometer: bits must be 32 or 64"),
    ],
)
def test_wrong_arguments_are_refused(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
