"""shared_relu_share: the dealer's algebra end to end, bits against the reference, layouts, errors."""

import random
import re

import pytest
import torch
from operator_cases import LAYOUTS, backend_parameters, device_of, laid_out
from torch import Tensor

from deepshare import ChannelMap, PackedGates, pack_gates, shared_relu_share
from deepshare.raw_ops import IMPLEMENTATIONS

BACKENDS = backend_parameters()
BITS = 16  # of the fraction

# [N, C, *S], P: pixels, rows shorter and longer than a byte of gates, several pieces, one channel
SHAPES = [
    ((3, 5), 2),
    ((70, 40), 17),
    ((2, 1, 1, 1), 1),
    ((2, 8, 3, 3), 8),
    ((2, 6, 2, 2), 1),
    ((2, 9, 8), 3),
    ((3, 7, 5, 9), 4),
    ((2, 3, 50, 50), 2),
]


def words(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Uniform int64, of which one in 8 is an extreme or a small number."""
    values = torch.randint(-(2**63), 2**63 - 1, shape, generator=draw)
    special = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 2**62, -(2**62), 2**32])[
        torch.randint(0, 8, shape, generator=draw)
    ]
    return torch.where(torch.randint(0, 8, shape, generator=draw) == 0, special, values)


def split(secret: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two additive shares in Z_2^64, each alone uniform."""
    share = torch.randint(-(2**63), 2**63 - 1, secret.shape, generator=draw)
    return share, secret - share


def fixed_point(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=draw) * 2**BITS).round().long()


def two_parties(
    shape: tuple[int, ...], fewer: ChannelMap, public: bool, backend: str, seed: int
) -> tuple[Tensor, Tensor]:
    """(the sum of both parties' results, the product x * (alpha * DReLU(x[pi]) + beta) before truncation)."""
    draw = torch.Generator().manual_seed(seed)
    x, alpha, beta = fixed_point(shape, draw), fixed_point(shape[1:2], draw), fixed_point(shape[1:2], draw)
    column = (1, -1) + (1,) * (len(shape) - 2)
    wide_alpha, wide_beta = alpha.reshape(column), beta.reshape(column)

    drelu = x[:, : fewer.prototypes] >= 0
    r = torch.randint(0, 2, drelu.shape, generator=draw).bool()  # the dealer's masks, and products with them
    a = words(shape, draw)
    hidden = r.long()[:, fewer.pi]
    products = {
        "flip": r.long() if public else wide_alpha * hidden,
        "offset": a * wide_beta + a * wide_alpha * hidden,
        "toggle": a * wide_alpha - 2 * a * wide_alpha * hidden,
    }
    opened, gates = x - a, pack_gates(drelu ^ r).repack(x)  # what both parties see
    secrets = {**products, "alpha": alpha, "beta": beta}
    shares = {name: split(secret, draw) for name, secret in secrets.items()}
    if public:
        shares |= {"alpha": (alpha, 0 * alpha), "beta": (beta, 0 * beta)}
    results = [
        shared_relu_share(
            opened.to(device_of(backend)),
            PackedGates(gates.bits.to(device_of(backend)), *gates[1:]),
            fewer.to(device_of(backend)),
            **{name: share[party].to(device_of(backend)) for name, share in shares.items()},
            scale=alpha.to(device_of(backend)) if public else None,
            party=party,
            shift=BITS,
            backend=backend,
        ).cpu()
        for party in (0, 1)
    ]
    return results[0] + results[1], x * (wide_alpha * drelu.long()[:, fewer.pi.cpu()] + wide_beta)


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_two_parties_add_up_to_the_fixed_point_product(backend: str, shape, prototypes: int, public: bool):
    pi = torch.randint(0, prototypes, (shape[1],), generator=torch.Generator().manual_seed(3))
    got, product = two_parties(shape, ChannelMap(pi, prototypes), public, backend, seed=4)
    # floor or ceiling of product / 2^16; it goes wrong with probability |product| / 2^64, here below 2^-24 an element
    assert ((got * 2**BITS - product).abs() < 2**BITS).all()
    assert product.abs().max() > 2**BITS


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_truncation_of_a_share(backend: str):
    """y = offset where all else is 0: each party's own truncation, rounded towards where the other's goes."""
    values = torch.tensor([[5, -5, 4, -4, 0, 2**63 - 1, -(2**63)]], device=device_of(backend))
    zeros, one_map = torch.zeros_like(values), ChannelMap.balanced(7, 1).to(values.device)
    gates = pack_gates(torch.zeros(1, 1, dtype=torch.bool, device=values.device))

    def truncated(party: int, shift: int) -> list[int]:
        y = shared_relu_share(
            zeros, gates, one_map, zeros[0], zeros[0], zeros, values, zeros, party=party, shift=shift, backend=backend
        )
        return y[0].tolist()

    assert truncated(0, 2) == [1, -2, 1, -1, 0, 2**61 - 1, -(2**61)]
    assert truncated(1, 2) == [2, -1, 1, -1, 0, 2**61, 2**61]  # -(-2^63) wraps to itself
    assert truncated(0, 0) == truncated(1, 0) == values[0].tolist()
    assert truncated(0, 63) == [0, -1, 0, -1, 0, 0, -1]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_has_the_bits_of_the_reference(backend: str, shape, prototypes: int, scaled: bool):
    draw, choose, device = torch.Generator().manual_seed(5), random.Random(5), device_of(backend)
    for layout in LAYOUTS:
        pi = torch.randint(0, prototypes, (shape[1],), generator=draw)
        fewer = ChannelMap(pi, prototypes).to(device)
        wider = (shape[0], prototypes + choose.randrange(3), *shape[2:])
        flip = _integers_laid_out(words(wider if scaled else shape, draw), choose.choice(LAYOUTS), choose)
        opened, offset, toggle = (
            _integers_laid_out(words(shape, draw), kind, choose) for kind in (layout, *choose.sample(LAYOUTS, 2))
        )
        alpha, beta, scale = (words((2 * shape[1],), draw)[::2].to(device) for _ in range(3))
        gates = pack_gates((torch.rand(wider, generator=draw) > 0.5).to(device))
        operands = (gates, fewer, alpha, beta, flip.to(device), offset.to(device), toggle.to(device))
        for party in (0, 1):
            options = {"party": party, "shift": choose.choice([0, 1, 16, 63]), "scale": scale if scaled else None}
            ours = shared_relu_share(opened.to(device), *operands, **options, backend=backend)
            expected = shared_relu_share(opened.to(device), *operands, **options, backend="reference")
            assert torch.equal(ours, expected), (layout, options)
            assert ours.stride() == torch.empty_like(opened).stride()


def _integers_laid_out(values: Tensor, layout: str, choose: random.Random) -> Tensor:
    """As laid_out, whose slices lie among NaN, which integers do not have."""
    return values.repeat_interleave(2, 1)[:, ::2] if layout == "sliced" else laid_out(values, layout, choose)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 4, 3, 0)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_tensors(backend: str, shape):
    empty = torch.zeros(shape, dtype=torch.int64, device=device_of(backend))
    vector, fewer = torch.zeros(4, dtype=torch.int64, device=empty.device), ChannelMap.balanced(4, 2).to(empty.device)
    gates = pack_gates(torch.zeros((shape[0], 2, *shape[2:]), dtype=torch.bool, device=empty.device))
    y = shared_relu_share(empty, gates, fewer, vector, vector, empty, empty, empty, party=0, shift=3, backend=backend)
    assert (y.shape, y.dtype) == (shape, torch.int64)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
def test_bits_do_not_depend_on_the_number_of_threads(backend: str):
    draw, threads, results = torch.Generator().manual_seed(6), torch.get_num_threads(), []
    for shape in [(64, 16, 16, 16), (4096, 48)]:
        opened, flip, offset, toggle = (words(shape, draw) for _ in range(4))
        alpha, beta = (words(shape[1:2], draw) for _ in range(2))
        gates = pack_gates(torch.rand((shape[0], 5, *shape[2:]), generator=draw) > 0.5)
        fewer = ChannelMap.balanced(shape[1], 5)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                shared_relu_share(
                    opened, gates, fewer, alpha, beta, flip, offset, toggle, party=1, shift=7, backend=backend
                )
            )
    torch.set_num_threads(threads)
    assert all(torch.equal(results[3 * k], results[3 * k + j]) for k in (0, 1) for j in (1, 2))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, layout: str, scaled: bool):
    torch.use_deterministic_algorithms(False)  # opcheck sets and compares it itself
    draw, choose, device = torch.Generator().manual_seed(7), random.Random(7), device_of(backend)
    opened, offset, toggle = (laid_out(words((2, 6, 3, 5), draw), layout, choose).to(device) for _ in range(3))
    flip = laid_out(words((2, 4 if scaled else 6, 3, 5), draw), layout, choose).to(device)
    vectors = [words((6,), draw).to(device) for _ in range(3)]
    gates = pack_gates((torch.rand((2, 4, 3, 5), generator=draw) > 0.5).to(device)).repack(opened)
    pi = ChannelMap.balanced(6, 4).pi.to(device)
    scale = vectors[2] if scaled else None
    run = IMPLEMENTATIONS[backend]["shared_relu_share"]
    torch.library.opcheck(run, (opened, gates.bits, pi, *vectors[:2], flip, scale, offset, toggle, 16, 1))


ONES = torch.ones(2, 4, 3, dtype=torch.int64)
GOOD = {
    "opened": ONES,
    "gates": pack_gates(torch.ones(2, 2, 3, dtype=torch.bool)),
    "channel_map": ChannelMap.balanced(4, 2),
    "alpha": ONES[0, :, 0],
    "beta": ONES[0, :, 0],
    "flip": ONES,
    "offset": ONES,
    "toggle": ONES,
    "party": 0,
    "shift": 16,
}
BAD = {
    "opened no tensor": ({"opened": 3}, TypeError, "opened must be an int64 tensor (got int)"),
    "opened float": ({"opened": ONES.float()}, TypeError, "opened must be an int64 tensor (got torch.float32)"),
    "opened channels": (
        {"opened": ONES[:, :3]},
        ValueError,
        "opened must be [N, 4, *S] as channel_map says (got [2, 3, 3])",
    ),
    "opened vector": ({"opened": ONES[0, :, 0]}, ValueError, "opened must be [N, 4, *S] as channel_map says (got [4])"),
    "gates no gates": ({"gates": ONES}, TypeError, "gates must be PackedGates (got Tensor)"),
    "gates of another batch": (
        {"gates": pack_gates(torch.ones(1, 2, 3, dtype=torch.bool))},
        ValueError,
        "gates must be of [2, '>=2', 3] (got 2 prototypes of [1, 2, 3])",
    ),
    "gates of other space": (
        {"gates": pack_gates(torch.ones(2, 2, 3, 1, dtype=torch.bool))},
        ValueError,
        "gates must be of [2, '>=2', 3] (got 2 prototypes of [2, 2, 3, 1])",
    ),
    "gates too few": (
        {"gates": pack_gates(torch.ones(2, 1, 3, dtype=torch.bool))},
        ValueError,
        "gates must be of [2, '>=2', 3] (got 1 prototypes of [2, 1, 3])",
    ),
    "map no map": ({"channel_map": ONES}, TypeError, "channel_map must be a ChannelMap (got Tensor)"),
    "map device": (
        {"channel_map": ChannelMap.balanced(4, 2).to("meta")},
        ValueError,
        "channel_map must be on opened's device cpu (got meta)",
    ),
    "alpha int32": ({"alpha": ONES[0, :, 0].int()}, TypeError, "alpha must be an int64 tensor (got torch.int32)"),
    "alpha length": ({"alpha": ONES[0, :3, 0]}, ValueError, "alpha must be [4] (got [3])"),
    "beta no tensor": ({"beta": None}, TypeError, "beta must be an int64 tensor (got NoneType)"),
    "beta shape": ({"beta": ONES[0, :, :1]}, ValueError, "beta must be [4] (got [4, 1])"),
    "scale length": ({"scale": ONES[0, 0]}, ValueError, "scale must be [4] (got [3])"),
    "scale float": ({"scale": torch.ones(4)}, TypeError, "scale must be an int64 tensor (got torch.float32)"),
    "flip shape": ({"flip": ONES[:, :2]}, ValueError, "flip must be [2, 4, 3] (got [2, 2, 3])"),
    "flip narrow under a scale": (
        {"flip": ONES[:, :1], "scale": ONES[0, :, 0]},
        ValueError,
        "flip must be [2, '>=2', 3] (got [2, 1, 3])",
    ),
    "flip vector under a scale": (
        {"flip": ONES[:, 0, 0], "scale": ONES[0, :, 0]},
        ValueError,
        "flip must be [2, '>=2', 3] (got [2])",
    ),
    "offset shape": ({"offset": ONES[:1]}, ValueError, "offset must be [2, 4, 3] (got [1, 4, 3])"),
    "toggle shape": ({"toggle": ONES[..., :1]}, ValueError, "toggle must be [2, 4, 3] (got [2, 4, 1])"),
    "toggle device": (
        {"toggle": ONES.to("meta")},
        ValueError,
        "toggle must be on opened's device cpu (got meta)",
    ),
    "party": ({"party": 2}, ValueError, "party must be an int in 0..1 (got 2)"),
    "party bool": ({"party": True}, ValueError, "party must be an int in 0..1 (got True)"),
    "shift negative": ({"shift": -1}, ValueError, "shift must be an int in 0..63 (got -1)"),
    "shift long": ({"shift": 64}, ValueError, "shift must be an int in 0..63 (got 64)"),
    "shift float": ({"shift": 16.0}, ValueError, "shift must be an int in 0..63 (got 16.0)"),
    "backend unknown": (
        {"backend": "opencl"},
        ValueError,
        "backend must be one of reference, cpu, triton, cuda (got 'opencl')",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        shared_relu_share(**{**GOOD, **changes})
    assert str(caught.value).startswith("shared_relu_share: ")


def test_the_unchanged_arguments_are_good():
    assert shared_relu_share(**GOOD).shape == (2, 4, 3)
    assert shared_relu_share(**{**GOOD, "flip": ONES[:, :3]}, scale=ONES[0, :, 0]).shape == (2, 4, 3)
