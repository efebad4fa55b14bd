"""shared_relu under torch.library.opcheck and torch.compile: no graph break, no recompilation while switching."""

from collections.abc import Callable

import pytest
import torch
from operator_cases import Case, backend_parameters, device_of, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from deepshare import SharedReLU2d, shared_relu
from deepshare.raw_ops import default_backend

BACKENDS = backend_parameters()
COMPILED = default_backend("cpu") != "reference"
RAW = {"cpu": "native", "cuda": "native", "triton": "triton"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def plain_buffers(poisoned_buffers):
    """opcheck and Inductor set deterministic mode and compare it themselves; here it stays off."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("soft", [None, 3])
@pytest.mark.parametrize("source_channels", [None, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, layout: str, source_channels: int | None, soft: int | None):
    case = Case(2, (2, 6, 3, 5), 3, "random", x_layout=layout, source_layout=layout, source_channels=source_channels)
    given = inputs(case, device_of(backend))
    device = given.x.device
    state = (None, None)
    if soft is not None:
        state = (torch.tensor(soft, dtype=torch.int32, device=device), torch.tensor(1.5, device=device))
    fewer = given.channel_map
    forward = getattr(torch.ops.deepshare, f"shared_relu_{RAW[backend]}").default
    backward = getattr(torch.ops.deepshare, f"shared_relu_backward_{RAW[backend]}").default
    affine = (given.alpha, given.beta)
    torch.library.opcheck(forward, (given.x, None, given.source, None, fewer.pi, *affine, *state))
    maps = (fewer.pi, fewer.members, fewer.offsets)
    torch.library.opcheck(backward, (given.grad, given.x, None, given.source, None, *maps, *affine, *state))


def gradients(call: Callable[..., Tensor], x: Tensor, source: Tensor | None, others: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_()] + ([] if source is None else [source.detach().requires_grad_()])
    y = call(*leaves)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    found = torch.autograd.grad((y * weight).sum(), leaves + others, allow_unused=True)
    return [y.detach(), *found]


def assert_same(ours: list[Tensor], expected: list[Tensor], exact: bool = COMPILED) -> None:
    for got, wanted in zip(ours, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("soft", [0, 3])
@pytest.mark.parametrize("backend", [pytest.param("reference"), *BACKENDS])
def test_function_compiles_whole(backend: str, soft: int, layout: str):
    given = inputs(Case(3, (2, 6, 3, 5), 3, x_layout=layout, source_channels=4), device_of(backend))
    alpha, beta = given.alpha.requires_grad_(), given.beta.requires_grad_()

    def call(x: Tensor, source: Tensor) -> Tensor:
        fewer = given.channel_map
        return shared_relu(x, fewer, alpha, beta, source=source, soft_channels=soft, gamma=2.0, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = (given.x, given.source, [alpha, beta])
    # the reference is composed of torch's own ops, whose sums Dynamo's graph may take in another order
    assert_same(gradients(compiled, *leaves), gradients(call, *leaves), exact=backend != "reference")
    assert compiled(given.x, given.source).stride() == call(given.x, given.source).stride()


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("soft", [0, 3])
def test_module_compiles_whole(soft: int, with_source: bool):
    given = inputs(Case(4, (2, 6, 3, 5), 3, source_channels=4 if with_source else None))
    act = SharedReLU2d(6, 3)
    act.soft_channels = soft
    parameters = list(act.parameters())
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, given.x, given.source, parameters),
                gradients(act, given.x, given.source, parameters))  # fmt: skip


def test_the_switch_recompiles_once_at_its_end():
    given = inputs(Case(5, (2, 6, 3, 5), 3))
    act = SharedReLU2d(6, 3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(act, fullgraph=True, backend=counter)
    for soft in (6, 5, 3, 1):
        act.soft_channels = soft
        assert_same(gradients(compiled, given.x, None, []), gradients(act, given.x, None, []))
    act.gamma.fill_(4.0)
    assert_same(gradients(compiled, given.x, None, []), gradients(act, given.x, None, []))
    assert counter.frame_count == 1
    act.soft_channels = 0
    assert_same(gradients(compiled, given.x, None, []), gradients(act, given.x, None, []))
    assert counter.frame_count == 2  # the hard path


def test_the_function_takes_the_switch_as_a_tensor_without_recompiling():
    given = inputs(Case(6, (2, 6, 3, 5), 3))
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Tensor, soft: Tensor, gamma: Tensor) -> Tensor:
        return shared_relu(x, given.channel_map, given.alpha, given.beta, soft_channels=soft, gamma=gamma)

    for soft, gamma in [(6, 1.0), (4, 1.0), (0, 2.0), (1, 3.0)]:
        state = {"soft_channels": torch.tensor(soft, dtype=torch.int32), "gamma": torch.tensor(gamma)}
        y = compiled(given.x, state["soft_channels"], state["gamma"])
        assert torch.equal(y, shared_relu(given.x, given.channel_map, given.alpha, given.beta, **state))
    assert counter.frame_count == 1


def test_other_batch_sizes_compile_to_one_dynamic_graph():
    act = SharedReLU2d(6, 3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(act, fullgraph=True, backend=counter, dynamic=True)
    for batch, size in [(2, 5), (3, 7), (8, 4)]:
        x = inputs(Case(7, (batch, 6, size, size), 3)).x
        assert_same(gradients(compiled, x, None, []), gradients(act, x, None, []))
    assert counter.frame_count == 1


def test_compiled_errors_are_the_same():
    compiled = torch.compile(SharedReLU2d(6, 3), backend="eager")
    with pytest.raises(ValueError, match=r"x must be \[N, 6, \*S\]"):
        compiled(torch.ones(2, 5, 3, 3))
