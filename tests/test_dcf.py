"""The distributed comparison function: edges, random gates, both forms byte for byte, and what a key gives away."""

import hashlib
import itertools
import os

import numpy as np
import pytest
import torch
from dcf_oracle import Oracle
from test_native import in_fresh_process
from torch import Tensor

from deepshare import raw_ops
from deepshare.secure.dealer import dcf_keys
from deepshare.secure.engine import carry, dcf
from deepshare.secure.engine.aes import FixedKeyHash
from deepshare.secure.engine.carry import unpack

WITHOUT_NATIVE = raw_ops.dcf_missing() is not None and os.environ.get("DEEPSHARE_BUILD") != "require"
NATIVE = pytest.mark.skipif(WITHOUT_NATIVE, reason=raw_ops.dcf_missing() or "runs")
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]
WIDTHS = (63, 31, 8, 9, 40)
PUBLIC_KEY = bytes(range(100, 116))


def random_bytes(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))


def random_words(generator: np.random.Generator, gates: int) -> Tensor:
    return torch.from_numpy(generator.integers(-(2**63), 2**63, gates, dtype=np.int64))


def signed(values: list[int]) -> Tensor:
    """Integers mod 2^64 as int64."""
    return torch.from_numpy(np.array([value % 2**64 for value in values], dtype=np.uint64).view(np.int64))


def low(values: Tensor, bits: int) -> np.ndarray:
    return values.numpy().view(np.uint64) & np.uint64(2**bits - 1)


def is_below(points: Tensor, alphas: Tensor, bits: int) -> Tensor:
    return torch.from_numpy((low(points, bits) < low(alphas, bits)).astype(np.uint8))


class Gates:
    """Gates with random roots, their keys made by one backend."""

    def __init__(self, alphas: Tensor, bits: int, backend: str | None, seed: int = 1) -> None:
        generator = np.random.default_rng(seed)
        self.alphas, self.bits, self.backend, self.count = alphas, bits, backend, len(alphas)
        self.roots = [random_bytes(generator, self.count, 16) for _ in range(2)]
        self.keys = dcf_keys.generate(alphas, *self.roots, public_key=PUBLIC_KEY, bits=bits, backend=backend)

    def share(self, points: Tensor, party: int, keys: Tensor | None = None, public_key: bytes = PUBLIC_KEY) -> Tensor:
        keys = self.keys if keys is None else keys
        how = {"public_key": public_key, "party": party, "bits": self.bits, "backend": self.backend}
        return dcf.evaluate(keys, self.roots[party], points, **how)

    def compared(self, points: Tensor, keys: Tensor | None = None, public_key: bytes = PUBLIC_KEY) -> Tensor:
        both = (self.share(points, party, keys, public_key) for party in range(2))
        return unpack(next(both) ^ next(both), self.count)


def edges(bits: int) -> list[int]:
    near = {2**k + d for k in range(bits) for d in (-1, 0, 1)}
    return sorted(value for value in near | {0, 1, 2**bits - 1} if 0 <= value < 2**bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_edge(bits: int, backend: str):
    near = edges(bits)
    around = [(alpha, alpha + d) for alpha in near for d in (-1, 0, 1)]
    pairs = list(itertools.product(near, near)) + around
    alphas, points = (signed(list(values)) for values in zip(*pairs, strict=True))
    assert torch.equal(Gates(alphas, bits, backend).compared(points), is_below(points, alphas, bits))


def random_case(gates: int, seed: int) -> tuple[Tensor, Tensor]:
    """(alphas, points): a third of the points anywhere, a third on alpha, a third a little beside it."""
    generator = np.random.default_rng(seed)
    alphas, points = random_words(generator, gates), random_words(generator, gates)
    third = gates // 3
    points[:third] = alphas[:third]
    points[third : 2 * third] = alphas[third : 2 * third] + torch.from_numpy(generator.integers(-200, 200, third))
    return alphas, points


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_random_gates(bits: int, backend: str):
    alphas, points = random_case(10_000, seed=bits)
    assert torch.equal(Gates(alphas, bits, backend).compared(points), is_below(points, alphas, bits))


@pytest.mark.slow
def test_four_million_gates():
    for seed in range(16):
        alphas, points = random_case(2**18, seed=1000 + seed)
        assert torch.equal(Gates(alphas, 63, None, seed).compared(points), is_below(points, alphas, 63))


@pytest.mark.parametrize("bits", range(8, 64))
def test_every_width(bits: int):
    alphas, points = random_case(99, seed=bits)
    assert torch.equal(Gates(alphas, bits, None).compared(points), is_below(points, alphas, bits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", [0, 1, 7, 8, 9, 129])
def test_any_number_of_gates(gates: int, backend: str):
    alphas, points = random_case(gates, seed=gates)
    made = Gates(alphas, 63, backend)
    assert made.keys.shape == (gates, dcf.key_bytes(63))
    for party in range(2):
        share = made.share(points, party)
        assert share.shape == ((gates + 7) // 8,)
        assert share.dtype == torch.uint8
        assert gates % 8 == 0 or int(share[-1]) >> gates % 8 == 0
    assert torch.equal(made.compared(points), is_below(points, alphas, 63))


@NATIVE
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("gates", [1, 31, 3001])
def test_native_gives_the_bytes_of_python(gates: int, bits: int):
    alphas, points = random_case(gates, seed=gates + bits)
    compiled, python = (Gates(alphas, bits, backend) for backend in ("native", "reference"))
    assert torch.equal(compiled.keys, python.keys)
    for party in range(2):
        assert torch.equal(compiled.share(points, party), python.share(points, party))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_keys_and_shares_are_those_of_the_paper(bits: int, backend: str):
    alphas, points = random_case(60, seed=bits + 70)
    made, oracle = Gates(alphas, bits, backend), Oracle(PUBLIC_KEY, bits)
    roots = [[bytes(root) for root in of_party.numpy()] for of_party in made.roots]
    keys = [oracle.generate(int(alpha), pair) for alpha, *pair in zip(low(alphas, bits), *roots, strict=True)]
    assert [bytes(key) for key in made.keys.numpy()] == keys
    for party in range(2):
        parts = zip(keys, roots[party], low(points, bits), strict=True)
        shares = [oracle.evaluate(party, key, root, int(point)) for key, root, point in parts]
        assert unpack(made.share(points, party), 60).tolist() == shares


@NATIVE
def test_bytes_do_not_depend_on_the_number_of_threads():
    alphas, points = random_case(20_001, seed=5)
    threads = torch.get_num_threads()
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        gates = Gates(alphas, 63, "native")
        made.append((gates.keys, gates.share(points, 0), gates.share(points, 1)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def digest() -> str:
    """Of what the native ops give: keys and shares of every width, leaves."""
    seen = hashlib.sha256()
    for bits in WIDTHS:
        alphas, points = random_case(1003, seed=bits)
        gates = Gates(alphas, bits, "native")
        codes = gates.keys.flatten().view(torch.int16)[: 16 * 1003].reshape(16, 1003)
        leaves = carry.leaves(codes, points, bits=64, backend="native")
        for result in (gates.keys, gates.share(points, 0), gates.share(points, 1), *leaves):
            seen.update(result.numpy().tobytes())
    return seen.hexdigest()


@NATIVE
def test_bytes_do_not_depend_on_the_instruction_set():
    asked = "from deepshare.kernels import native; print(native.load().build_info()['aes_kernels'])"
    code = f"{asked}; import test_dcf; print(test_dcf.digest())"
    assert in_fresh_process(code, DEEPSHARE_CPU_ISA="baseline") == ["aes_ni", digest()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_may_have_any_strides(backend: str):
    alphas, points = random_case(50, seed=3)
    made = Gates(alphas, 31, backend)
    wide = torch.stack([made.roots[0], made.roots[1]], dim=-1)
    apart = {"public_key": PUBLIC_KEY, "bits": 31, "backend": backend}
    keys = dcf_keys.generate(torch.stack([alphas, points], 1)[:, 0], wide[..., 0], wide[..., 1], **apart)
    assert torch.equal(keys, made.keys)
    share = dcf.evaluate(keys.T.contiguous().T, wide[..., 1], torch.stack([points, points], 1)[:, 0], party=1, **apart)
    assert torch.equal(share, made.share(points, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_low_bits_of_points_and_the_seed_of_roots_count(backend: str):
    alphas, points = random_case(64, seed=4)
    made = Gates(alphas, 31, backend)
    above = torch.tensor(-1) << 31
    again = Gates(alphas ^ above, 31, backend)
    assert torch.equal(again.keys, made.keys)
    made.roots[0][:, 0] ^= 7
    assert torch.equal(made.share(points ^ above, 0), again.share(points, 0))


# --- what is secret, and what a mistake does


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_public_key_gives_garbage(backend: str):
    alphas, points = random_case(4000, seed=6)
    got = Gates(alphas, 63, backend).compared(points, public_key=bytes(16))
    assert 0.45 < (got != is_below(points, alphas, 63)).float().mean() < 0.55


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_share_says_nothing(backend: str):
    alphas = signed([2**62] * 4000)
    for point in (0, 2**63 - 1):
        made = Gates(alphas, 63, backend)
        ones = unpack(made.share(signed([point] * 4000), 0), 4000).float().mean()
        assert 0.45 < ones < 0.55


def non_uniformity(keys: Tensor) -> float:
    """The worst of all byte values' and all bit places' frequencies, in standard deviations from that of coins."""
    data = keys.numpy()
    counts = np.bincount(data.reshape(-1), minlength=256)
    of_bytes = np.abs(counts - data.size / 256) / np.sqrt(data.size / 256)
    ones = np.unpackbits(data, axis=1).sum(0, dtype=np.int64)
    of_places = np.abs(ones - len(data) / 2) / np.sqrt(len(data) / 4)
    return float(max(of_bytes.max(), of_places.max()))


@pytest.mark.parametrize("alpha", [0, 1, 2**63 - 1, 2**62 + 12345])
def test_keys_are_uniform_whatever_alpha_is(alpha: int):
    # 7,552 frequencies: the largest of as many normal values is beyond 6 once in 10^5 runs; the seed is fixed
    assert non_uniformity(Gates(signed([alpha] * 8000), 63, None).keys) < 6


def test_parties_with_one_root_are_noticed():
    """The planted mistake: correction words that nothing masks."""
    roots = random_bytes(np.random.default_rng(1), 8000, 16)
    keys = dcf_keys.generate(signed([1] * 8000), roots, roots, public_key=PUBLIC_KEY, bits=63)
    assert non_uniformity(keys) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_roots_give_other_keys(backend: str):
    alphas, _ = random_case(300, seed=7)
    first, second = (Gates(alphas, 63, backend, seed).keys.view(torch.int64) for seed in (1, 2))
    assert not bool((first == second).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_of_the_leaf_flips_the_result_on_the_path(backend: str):
    alphas, _ = random_case(500, seed=8)
    made = Gates(alphas, 63, backend)
    bit = low(alphas, 7).astype(np.int64)
    keys = made.keys.clone()
    rows = np.arange(500)
    keys[rows, dcf.key_bytes(63) - 16 + bit // 8] ^= torch.from_numpy((1 << bit % 8).astype(np.uint8))
    assert bool((made.compared(alphas, keys) == 1).all())  # alpha < alpha is 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0, 1, 30, 55])
def test_a_flipped_bit_of_a_level_spoils_the_path_and_nothing_else(level: int, backend: str):
    alphas, _ = random_case(2000, seed=9)
    made = Gates(alphas, 63, backend)
    keys = made.keys.clone()
    keys[:, 16 * level + 9] ^= 4
    assert 0.4 < made.compared(alphas, keys).float().mean() < 0.6
    if level > 0:  # a point that left alpha's path above: both parties use the word, or neither does
        beside = alphas ^ 2**62
        assert torch.equal(made.compared(beside, keys), is_below(beside, alphas, 63))


def test_the_hash_is_aes_128():
    """FIPS 197, appendix C.1."""
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    blocks = np.frombuffer(2 * plain, dtype="<u8").reshape(2, 2)
    cipher = (FixedKeyHash(bytes(range(16)))(blocks) ^ blocks).tobytes()
    assert cipher == 2 * bytes.fromhex("69c4e0d86a7b0430d8cdb78070b4c55a")


# --- errors


def a_call() -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    keys, roots, points = torch.zeros(3, 912).byte(), torch.zeros(3, 16).byte(), torch.zeros(3).long()
    return (keys, roots, points), {"public_key": PUBLIC_KEY, "party": 0, "bits": 63}


@pytest.mark.parametrize(
    ("place", "given", "error", "message"),
    [
        (0, torch.zeros(3, 911).byte(), ValueError, r"dcf.evaluate: keys must be \[3, 912\] \(got \[3, 911\]\)"),
        (0, torch.zeros(3, 912), TypeError, "dcf.evaluate: keys must be a torch.uint8 tensor"),
        (1, torch.zeros(2, 16).byte(), ValueError, r"roots must be \[3, 16\] \(got \[2, 16\]\)"),
        (1, [0], TypeError, r"roots must be a torch.uint8 tensor \(got list\)"),
        (2, torch.zeros(3, 1).long(), ValueError, r"points must be \[G\] \(got \[3, 1\]\)"),
        (2, torch.zeros(3).int(), TypeError, "points must be a torch.int64 tensor"),
        (2, torch.zeros(3, device="meta").long(), ValueError, r"points must be on the CPU \(got meta\)"),
        ("public_key", bytes(15), ValueError, r"public_key must be 16 bytes \(got 15\)"),
        ("public_key", "0" * 16, TypeError, r"public_key must be bytes \(got str\)"),
        ("party", 2, ValueError, r"party must be 0 or 1 \(got 2\)"),
        ("party", True, ValueError, r"party must be 0 or 1 \(got True\)"),
        ("bits", 64, ValueError, r"dcf: bits must be an int in 8..63 \(got 64\)"),
        ("bits", 7, ValueError, r"dcf: bits must be an int in 8..63 \(got 7\)"),
        ("backend", "cpu", ValueError, r"backend must be one of native, reference \(got 'cpu'\)"),
    ],
)
def test_evaluate_refuses(place: int | str, given: object, error: type[Exception], message: str):
    tensors, settings = a_call()
    if isinstance(place, int):
        tensors = (*tensors[:place], given, *tensors[place + 1 :])
    else:
        settings[place] = given
    with pytest.raises(error, match=message):
        dcf.evaluate(*tensors, **settings)


def test_generate_refuses():
    alphas, roots = torch.zeros(3).long(), torch.zeros(3, 16).byte()
    with pytest.raises(ValueError, match=r"dcf_keys.generate: roots1 must be \[3, 16\] \(got \[4, 16\]\)"):
        dcf_keys.generate(alphas, roots, torch.zeros(4, 16).byte(), public_key=PUBLIC_KEY, bits=63)
    with pytest.raises(TypeError, match=r"dcf_keys.generate: alphas must be a torch.int64 tensor"):
        dcf_keys.generate(alphas.int(), roots, roots, public_key=PUBLIC_KEY, bits=63)


def test_a_missing_native_form_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dcf, "dcf_missing", lambda: "no such instruction")
    tensors, settings = a_call()
    assert dcf.evaluate(*tensors, **settings).shape == (1,)
    with pytest.raises(RuntimeError, match=r"dcf.evaluate: backend 'native' is not available: no such instruction"):
        dcf.evaluate(*tensors, **settings, backend="native")
