"""shared_relu with a residual, with packed gates, and returning gates: values, gradients, what is saved, errors."""

import io
import re
from collections.abc import Callable

import pytest
import torch
from operator_cases import device_of, truncates
from property_runs import BACKENDS, COMPILED_BACKENDS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepshare import ChannelMap, PackedGates, pack_gates, shared_relu

RAW = {"cpu": "native", "cuda": "native", "triton": "triton"}
N, C, P, SIZE = 2, 6, 3, (5, 7)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def activation(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32, channels: int = C) -> Tensor:
    """Normal values of which every seventh is 0 or -0.0."""
    values = torch.randn(N, channels, *SIZE, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[::14], values.view(-1)[7::14] = 0.0, -0.0
    return values.to(device, dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Site:
    """A channel map, alpha and beta on a device, and calls with them."""

    def __init__(self, backend: str, prototypes: int = P) -> None:
        self.backend, self.device = backend, device_of(backend)
        pi = torch.tensor([1, 2, 0, 0, 2, 1]) % prototypes
        self.channel_map = ChannelMap(pi, prototypes).to(self.device)
        generator = torch.Generator().manual_seed(11)
        self.alpha, self.beta = (torch.randn(C, generator=generator).to(self.device).requires_grad_() for _ in range(2))

    def __call__(self, x: Tensor, **state):  # type: ignore[no-untyped-def]
        return shared_relu(x, self.channel_map, self.alpha, self.beta, backend=self.backend, **state)

    def activation(self, seed: int, dtype: torch.dtype = torch.float32, channels: int = C) -> Tensor:
        return activation(seed, self.device, dtype, channels)


def skip_truncated_sums(backend: str, dtype: torch.dtype) -> None:
    if truncates(backend, dtype):
        pytest.skip("Triton's interpreter truncates the sum to bfloat16 where torch rounds it")


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad(y, leaves, weight)


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("soft", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_and_the_residual_get_the_same_gradient(backend: str, dtype: torch.dtype, soft: int):
    skip_truncated_sums(backend, dtype)
    site = Site(backend)
    x, residual = site.activation(1, dtype).requires_grad_(), site.activation(2, dtype).requires_grad_()
    y = site(x, residual=residual, soft_channels=soft)
    dx, dresidual, *affine = gradients(y, x, residual, site.alpha, site.beta)
    total = (x + residual).detach().requires_grad_()
    plain = site(total, soft_channels=soft)
    assert torch.equal(y, plain)
    assert torch.equal(dx, dresidual)
    assert_same((dx, *affine), gradients(plain, total, site.alpha, site.beta))


@pytest.mark.parametrize("wanted", ["x", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_operand_of_the_sum_may_be_a_constant(backend: str, wanted: str):
    site = Site(backend)
    operands = {"x": site.activation(1), "residual": site.activation(2)}
    both = [t.clone().requires_grad_() for t in operands.values()]
    (expected, _) = gradients(site(both[0], residual=both[1]), *both)
    leaf = operands[wanted].requires_grad_()
    assert torch.equal(gradients(site(operands["x"], residual=operands["residual"]), leaf)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_rounded_before_its_sign_is_taken(backend: str):
    # 1 + 2^-12 is 1 in float16; its square term would show a sum that was kept in float32
    site = Site(backend)
    x = torch.full((N, C, *SIZE), 1.0, device=site.device, dtype=torch.float16)
    residual = torch.full_like(x, 2**-12)
    assert torch.equal(site(x, residual=residual), site(x))
    leaf, zeros = x.clone().requires_grad_(), torch.zeros_like(x).requires_grad_()
    opposite = site(leaf, residual=-x)  # exactly 0: the gates are open
    assert not opposite.any()
    assert torch.equal(gradients(opposite, leaf)[0], gradients(site(zeros), zeros)[0])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_follower_of_packed_gates_is_a_follower_of_the_pre_activation(
    backend: str, layout: str, dtype: torch.dtype, with_residual: bool
):
    if with_residual:
        skip_truncated_sums(backend, dtype)
    site = Site(backend)
    before, x = site.activation(3, dtype), site.activation(4, dtype).requires_grad_()
    before = channels_last(before) if layout == "last" else before
    residual = site.activation(5, dtype) if with_residual else None
    y, gates = site(before, residual=residual, return_gates=True)
    leader = before if residual is None else before + residual
    assert torch.equal(y, site(leader))
    assert isinstance(gates, PackedGates)
    assert torch.equal(gates.unpack(), leader[:, :P] >= 0)
    assert gates.bits.requires_grad is False
    leaves = (x, site.alpha, site.beta)
    # x is NCHW: gates packed in channels_last are packed again
    by_bits, by_source = site(x, source=gates), site(x, source=leader)
    assert torch.equal(by_bits, by_source)
    assert_same(gradients(by_bits, *leaves), gradients(by_source, *leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_an_nchw_leader_serve_an_nhwc_follower(backend: str):
    site = Site(backend)
    before, x = site.activation(3), channels_last(site.activation(4))
    _, gates = site(before, return_gates=True)
    assert not gates.fits(x)
    y = site(x, source=gates)
    assert y.stride() == x.stride()
    assert torch.equal(y, site(x, source=before))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_gates_are_handed_on_as_pre_activations_of_prototypes(backend: str, as_tensor: bool, with_residual: bool):
    site = Site(backend)
    soft = torch.tensor(4, dtype=torch.int32, device=site.device) if as_tensor else 4
    before = site.activation(3).requires_grad_()
    residual = site.activation(5).requires_grad_() if with_residual else None
    y, source = site(before, residual=residual, soft_channels=soft, return_gates=True)
    total = before if residual is None else before + residual
    assert torch.equal(y, site(total, soft_channels=soft))
    assert isinstance(source, Tensor)
    assert torch.equal(source, total[:, :P])
    assert source.is_contiguous()
    x = site.activation(4)
    leaves = [before] if residual is None else [before, residual]
    followed, again = site(x, source=source, soft_channels=soft), site(x, source=total, soft_channels=soft)
    assert_same(gradients(followed, *leaves), gradients(again, *leaves))


@pytest.mark.parametrize("soft", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_follower_hands_its_source_on(backend: str, soft: int):
    site = Site(backend)
    before, x = site.activation(3), site.activation(4)
    _, source = site(before, soft_channels=soft, return_gates=True)
    y, handed = site(x, source=source, soft_channels=soft, return_gates=True)
    assert handed is source
    assert torch.equal(y, site(x, source=source, soft_channels=soft))


def test_soft_sums_keep_the_strides_of_x():
    # x + residual alone takes the residual's strides where x has overlapping ones
    site = Site("reference")
    x = torch.randn(2, C, 1, 1).expand(2, C, 2, 3)
    residual = channels_last(torch.randn(2, C, 2, 3))
    y, source = site(x, residual=residual, soft_channels=2, return_gates=True)
    assert y.stride() == torch.empty_like(x).stride()
    assert source.stride() == torch.empty_like(x[:, :P]).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("prototypes", [1, P, C])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_followers_gradients_reach_the_leader_as_through_a_slice(
    layout: str, prototypes: int, with_residual: bool, dtype: torch.dtype
):
    """Bit for bit, also where what is handed on is used more than once, by others, or not at all."""
    site = Site("reference", prototypes)
    order = torch.channels_last if layout == "last" else torch.contiguous_format
    leaves = [site.activation(seed, dtype).contiguous(memory_format=order).requires_grad_() for seed in (3, 4, 5, 6)]
    before, residual, x, other = leaves
    added = residual if with_residual else None

    def block(handed: bool, uses: int) -> Tensor:
        if handed:
            first, source = site(before, residual=added, soft_channels=4, return_gates=True)
        else:
            total = before if added is None else before + added
            first, source = site(total, soft_channels=4), total[:, :prototypes]
        followers = [site(value, source=source, soft_channels=4) for value in (x, other)]
        return first + sum(followers[:uses]) + (source[:, :1] * 0.5 if uses == 2 else 0)

    for uses in (0, 1, 2):
        found, wanted = (
            torch.autograd.grad(block(handed, uses).float().square().sum(), leaves[:2] if with_residual else [before])
            for handed in (True, False)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gates_from", ["own", "source", "packed", "emitted"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_new_is_saved_for_backward(backend: str, dtype: torch.dtype, with_residual: bool, gates_from: str):
    site = Site(backend)
    before, x = site.activation(3, dtype), site.activation(4, dtype).requires_grad_()
    residual = site.activation(5, dtype).requires_grad_() if with_residual else None
    source = {"source": before, "packed": pack_gates(before[:, :P] >= 0)}.get(gates_from)
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = site(x, residual=residual, source=source, return_gates=gates_from == "emitted")
    leader = source.bits if isinstance(source, PackedGates) else source
    for known in (x, residual, leader):
        if known is not None:
            assert saved.pop(known.untyped_storage().data_ptr()).untyped_storage().nbytes() == known.nbytes
    # pi, members, offsets, alpha and beta: per channel, in float32; scalars
    assert sum(t.untyped_storage().nbytes() for t in saved.values()) <= 4 * (4 * C + P + 1) + 16
    if gates_from == "packed":
        assert leader.nbytes == N * P * -(-SIZE[0] * SIZE[1] // 8)
    (out[0] if gates_from == "emitted" else out).float().sum().backward()


def block(site: Site, soft: int | Tensor = 0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A leader that emits its gates, and two followers, one with a residual."""

    def run(before: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        first, gates = site(before, residual=residual, soft_channels=soft, return_gates=True)
        second = site(x + first, source=gates, soft_channels=soft)
        return site(second * 0.5, source=gates, residual=residual, soft_channels=soft)

    return run


@pytest.mark.parametrize("soft", [0, 4])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leader_and_followers_compile_whole(backend: str, layout: str, soft: int):
    torch.use_deterministic_algorithms(False)
    site = Site(backend)
    leaves = [site.activation(seed) for seed in (3, 4, 5)]
    leaves = [(channels_last(t) if layout == "last" else t).requires_grad_() for t in leaves]
    switch = torch.tensor(soft, dtype=torch.int32, device=site.device) if soft else 0
    compiled = torch.compile(block(site, switch), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*leaves), block(site, switch)(*leaves)
    assert torch.equal(ours, expected)
    assert ours.stride() == expected.stride()
    for one, other in zip(gradients(ours, *leaves, site.alpha), gradients(expected, *leaves, site.alpha), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_recomputes_the_gates(backend: str):
    site = Site(backend)
    leaves = [site.activation(seed).requires_grad_() for seed in (3, 4, 5)]
    again = checkpoint(block(site), *leaves, use_reentrant=False)
    expected = block(site)(*leaves)
    assert torch.equal(again, expected)
    wanted = (*leaves, site.alpha, site.beta)
    assert_same(gradients(again, *wanted), gradients(expected, *wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_dtypes_to_x(backend: str):
    site = Site(backend)
    before, x, residual = (site.activation(seed, torch.bfloat16).requires_grad_() for seed in (3, 4, 5))
    with torch.autocast(site.device, dtype=torch.bfloat16):
        y = block(site)(before, x, residual)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, block(site)(before, x, residual))
    y.float().sum().backward()
    assert site.alpha.grad.dtype == torch.float32
    assert residual.grad.dtype == torch.bfloat16


def test_export():
    site = Site("reference" if torch.cuda.is_available() else None)  # type: ignore[arg-type]

    class Block(torch.nn.Module):
        def forward(self, before: Tensor, x: Tensor, residual: Tensor) -> Tensor:
            return block(site)(before, x, residual)

    inputs = tuple(activation(seed) for seed in (3, 4, 5))
    site.alpha.requires_grad_(False)
    site.beta.requires_grad_(False)
    program = torch.export.export(Block(), inputs)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(*inputs), Block()(*inputs))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_opcheck(backend: str, with_residual: bool, layout: str):
    torch.use_deterministic_algorithms(False)
    site = Site(backend)
    place = channels_last if layout == "last" else torch.clone
    x, grad = place(site.activation(4)), place(site.activation(5))
    residual = place(site.activation(6)) if with_residual else None
    gates = pack_gates(place(site.activation(3)) [:, :P] >= 0) .repack(x).bits  # fmt: skip
    maps, affine = site.channel_map, (site.alpha.detach(), site.beta.detach())

    def op(name: str):  # type: ignore[no-untyped-def]
        return getattr(torch.ops.deepshare, f"{name}_{RAW[backend]}").default

    torch.library.opcheck(op("shared_relu_emit"), (x, residual, maps.pi, *affine, P))
    torch.library.opcheck(op("shared_relu"), (x, residual, None, gates, maps.pi, *affine, None, None))
    inverse = (maps.pi, maps.members, maps.offsets)
    torch.library.opcheck(op("shared_relu_backward"), (grad, x, residual, None, gates, *inverse, *affine, None, None))


GATES = pack_gates(torch.ones(N, P, *SIZE, dtype=torch.bool))
BAD = {
    "residual no tensor": ({"residual": 1.0}, TypeError, "residual must be a tensor (got float)"),
    "residual dtype": (
        {"residual": activation(1).double()},
        TypeError,
        "residual must be torch.float32 on cpu like x (got torch.float64 on cpu)",
    ),
    "residual device": (
        {"residual": activation(1).to("meta")},
        TypeError,
        "residual must be torch.float32 on cpu like x (got torch.float32 on meta)",
    ),
    "residual shape": (
        {"residual": activation(1)[:1]},
        ValueError,
        "residual must be [2, 6, 5, 7] like x (got [1, 6, 5, 7])",
    ),
    "gates of another batch": (
        {"source": pack_gates(torch.ones(3, P, *SIZE, dtype=torch.bool))},
        ValueError,
        "source must be packed gates of a tensor [2, 'C', 5, 7] (got [3, 3, 5, 7])",
    ),
    "gates of another size": (
        {"source": pack_gates(torch.ones(N, P, 7, 5, dtype=torch.bool))},
        ValueError,
        "source must be packed gates of a tensor [2, 'C', 5, 7] (got [2, 3, 7, 5])",
    ),
    "gates of another rank": (
        {"source": pack_gates(torch.ones(N, P, dtype=torch.bool))},
        ValueError,
        "source must be packed gates of a tensor [2, 'C', 5, 7] (got [2, 3])",
    ),
    "too few gates": (
        {"source": pack_gates(torch.ones(N, 2, *SIZE, dtype=torch.bool))},
        ValueError,
        "source must have 3 prototypes or more (got 2)",
    ),
    "gates on another device": (
        {"source": GATES._replace(bits=GATES.bits.to("meta"))},
        TypeError,
        "source must be on x's device cpu (got meta)",
    ),
    "soft gates from bits": (
        {"source": GATES, "soft_channels": 2},
        ValueError,
        "soft gates need the leader's pre-activation as source (got PackedGates, which are hard)",
    ),
    "a soft switch and bits": (
        {"source": GATES, "soft_channels": torch.tensor(0, dtype=torch.int32)},
        ValueError,
        "soft gates need the leader's pre-activation as source (got PackedGates, which are hard)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        Site("reference")(activation(4), **changes)
    assert str(caught.value).startswith("shared_relu: ")


def test_the_unchanged_arguments_are_good():
    assert Site("reference")(activation(4), source=GATES, residual=activation(1)).shape == (N, C, *SIZE)
