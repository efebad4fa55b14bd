"""shared_relu at its edges: empty and tiny shapes, special values, reruns, threads, memory, state given two ways."""

import math
from dataclasses import replace

import pytest
import torch
from operator_cases import Case, assert_agrees, backend_parameters, device_of, inputs, run, truncates
from torch import Tensor
from torch.autograd import forward_ad

from deepshare import ChannelMap, shared_relu

BACKENDS = backend_parameters()
EVERY_BACKEND = [pytest.param("reference"), *BACKENDS]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("soft", [0, 1])
@pytest.mark.parametrize("source_channels", [None, 3])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (0, 4), (0, 4, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, ...], source_channels: int | None, soft: int):
    case = Case(seed=0, shape=shape, prototypes=3, soft=soft, source_channels=source_channels)
    given = inputs(case, device_of(backend))
    result = run(case, given, backend)
    assert result.y.shape == result.dx.shape == shape
    assert result.dalpha.tolist() == result.dbeta.tolist() == [0.0] * 4
    if soft and source_channels:
        assert result.dsource.shape == given.source.shape


@pytest.mark.parametrize("soft", [0, 1])
@pytest.mark.parametrize("source_channels", [None, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1), (7, 1, 3), (3, 1, 1, 33)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel(backend: str, shape: tuple[int, ...], source_channels: int | None, soft: int):
    case = Case(seed=1, shape=shape, prototypes=1, soft=soft, source_channels=source_channels)
    given = inputs(case, device_of(backend))
    assert_agrees(case, given, run(case, given, backend), run(case, given, "reference"), truncating=False)


@pytest.mark.parametrize("prototypes", [1, 13])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prototype_and_all_prototypes(backend: str, layout: str, prototypes: int):
    for soft in (0, 6, 13):
        case = Case(seed=2, shape=(3, 13, 3, 5), prototypes=prototypes, soft=soft, x_layout=layout, grad_layout=layout)
        given = inputs(case, device_of(backend))
        assert_agrees(case, given, run(case, given, backend), run(case, given, "reference"), truncating=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prototype_may_take_another_prototypes_gate(backend: str):
    pi = torch.tensor([1, 2, 0, 0, 2])
    case = Case(seed=3, shape=(3, 5, 4, 4), prototypes=3, soft=4)
    given = replace(inputs(case, device_of(backend)), channel_map=ChannelMap(pi, 3).to(device_of(backend)))
    assert_agrees(case, given, run(case, given, backend), run(case, given, "reference"), truncating=False)


def specials(dtype: torch.dtype, subnormals: bool) -> Tensor:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, NAN, INF, -INF, info.smallest_normal, info.max, info.min, 1.0, -1.5]
    if subnormals:
        values += [info.smallest_normal * info.eps, -info.smallest_normal * info.eps]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def every_pair(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """x [1, 2, S] whose prototype and replicate take every pair of `values`, and a gradient of ones."""
    prototype, replicate = values.repeat_interleave(len(values)), values.repeat(len(values))
    x = torch.stack([prototype, replicate]).unsqueeze(0)
    if layout == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, torch.ones_like(x)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy under Triton's interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("soft", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str, dtype: torch.dtype, soft: int, layout: str):
    # alpha 1 and beta 0.5: no order of the multiplications overflows, so NaN and inf must stand in the same places.
    # Triton's interpreter reads a subnormal bfloat16 as 0.
    truncating = truncates(backend, dtype)
    x, grad = every_pair(specials(dtype, subnormals=not truncating).to(device_of(backend)), layout)
    results = []
    for name in (backend, "reference"):
        leaf = x.detach().requires_grad_()
        alpha, beta = (torch.full((2,), v, device=x.device, requires_grad=True) for v in (1.0, 0.5))
        y = shared_relu(leaf, ChannelMap.balanced(2, 1).to(x.device), alpha, beta, soft_channels=soft, backend=name)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, alpha, beta), grad)))
    # hard: the same bits; soft: one unit of x's dtype, or of the gate's 16 roundings in float32 (alpha's dtype)
    unit, gate_units = torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps
    rtol = max(unit, gate_units) if soft else unit * truncating
    atol = max(gate_units * (soft > 0), torch.finfo(dtype).smallest_normal * truncating)
    for name, ours, expected in zip(("y", "dx", "dalpha", "dbeta"), *results, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy under Triton's interpreter
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_minus_infinity_times_a_closed_gate_is_nan_where_relu_gives_zero(backend: str):
    x = torch.tensor([[-INF], [2.0]], device=device_of(backend)).reshape(1, 2, 1)
    one, zero = torch.ones(2, device=x.device), torch.zeros(2, device=x.device)
    y = shared_relu(x, ChannelMap.balanced(2, 1).to(x.device), one, zero, backend=backend)
    assert y[0, 0, 0].isnan()
    assert y[0, 1, 0] == 0
    assert torch.relu(x)[0, 0, 0] == 0


def bits(result) -> list[Tensor]:
    tensors = [result.y, result.dx, result.dsource, result.dalpha, result.dbeta]
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.contiguous().view(views[t.element_size()]) for t in tensors if t is not None]


MANY_BLOCKS = [
    Case(seed=4, shape=(3, 17, 65, 63), prototypes=5, map_kind="random"),
    Case(seed=5, shape=(3, 17, 65, 63), prototypes=5, map_kind="random", soft=11, source_channels=6),
    Case(seed=6, shape=(3, 17, 65, 63), prototypes=5, soft=17, x_layout="channels_last", dtype=torch.bfloat16),
    Case(seed=7, shape=(30011, 9), prototypes=4, soft=3, soft_as_tensor=True),
]
FEW_BLOCKS = [
    replace(case, shape=(2, 9, 5, 7) if len(case.shape) == 4 else (41, 9), soft=min(case.soft, 9))
    for case in MANY_BLOCKS
]


@pytest.mark.parametrize("number", range(len(MANY_BLOCKS)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_give_the_same_bits(backend: str, number: int):
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    case = (FEW_BLOCKS if interpreted else MANY_BLOCKS)[number]
    given = inputs(case, device_of(backend))
    first = bits(run(case, given, backend))
    for _ in range(3):
        assert all(map(torch.equal, first, bits(run(case, given, backend))))


@pytest.mark.parametrize("case", MANY_BLOCKS, ids=range(len(MANY_BLOCKS)))
@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
def test_the_number_of_threads_changes_no_bit(backend: str, case: Case):
    given = inputs(case)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(bits(run(case, given, backend)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [0, 3])
@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_only_x_and_source_are_saved_for_backward(backend: str, with_source: bool, soft: int, dtype: torch.dtype):
    channels = 6
    case = Case(0, (2, channels, 8, 8), 2, dtype=dtype, source_channels=2 if with_source else None, soft=soft)
    given = inputs(case, device_of(backend))
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = [t.detach().requires_grad_() for t in (given.x, given.alpha, given.beta)]
    source = None if given.source is None else given.source.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = shared_relu(
            leaves[0], given.channel_map, leaves[1], leaves[2], source=source, soft_channels=soft, backend=backend
        )
    activations = [leaves[0]] + ([source] if with_source else [])
    for activation in activations:
        assert saved.pop(activation.untyped_storage().data_ptr()) == activation.nbytes
    # what is left is per channel: pi, members, offsets, alpha, beta, and the two scalars of the switch
    assert 0 < sum(saved.values()) <= 4 * (5 * channels + 1) + 8
    y.sum().backward()


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("soft", [0, 1, 4, 7])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_soft_channels_as_int_and_as_tensor_are_the_same(backend: str, soft: int, with_source: bool):
    case = Case(5, (2, 7, 5, 3), 3, source_channels=4 if with_source else None, soft=soft)
    given = inputs(case, device_of(backend))
    plain, tensor = (run(replace(case, soft_as_tensor=flag), given, backend) for flag in (False, True))
    for name in ("y", "dx", "dalpha", "dbeta"):
        assert torch.equal(getattr(plain, name), getattr(tensor, name)), name
    if with_source and soft == 0:
        assert plain.dsource is None  # the int is known when tracing: nothing flows into the source at all
        assert not tensor.dsource.any()
    elif with_source:
        assert torch.equal(plain.dsource, tensor.dsource)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_gamma_as_number_and_as_tensor_are_the_same(backend: str):
    given = inputs(Case(6, (2, 7, 5), 3), device_of(backend))
    call = {"soft_channels": 5, "backend": backend}
    tensor = torch.tensor(2.5, dtype=torch.float16, device=given.x.device)
    one, other = (
        shared_relu(given.x, given.channel_map, given.alpha, given.beta, gamma=g, **call) for g in (2.5, tensor)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(("given_as", "means"), [(8, 7), (1000, 7), (-1, 0)])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_tensor_out_of_range_means_the_nearest_in_range(backend: str, given_as: int, means: int):
    # it cannot be checked without waiting for the device
    given = inputs(Case(13, (2, 7, 5), 3, source_channels=3), device_of(backend))
    ours, expected = (
        run(Case(13, (2, 7, 5), 3, source_channels=3, soft=soft, soft_as_tensor=True), given, backend)
        for soft in (given_as, means)
    )
    assert all(map(torch.equal, bits(ours), bits(expected)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_and_beta_may_have_any_strides(backend: str):
    given = inputs(Case(8, (2, 6, 3, 5), 3), device_of(backend))
    strided = {"alpha": given.alpha.repeat_interleave(2)[::2], "beta": given.beta[:1].expand(6)}
    dense = {name: value.clone(memory_format=torch.contiguous_format) for name, value in strided.items()}
    results = []
    for affine in (strided, dense):
        leaves = [value.detach().requires_grad_() for value in affine.values()]
        y = shared_relu(given.x, given.channel_map, *leaves, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, given.grad)])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_x_as_its_own_source(backend: str):
    # the two gradients that meet in x are the one without a source, rounded once more
    given = inputs(Case(7, (2, 5, 9), 2), device_of(backend))
    gradients = []
    for own in (False, True):
        x = given.x.detach().requires_grad_()
        y = shared_relu(
            x, given.channel_map, given.alpha, given.beta, source=x if own else None, soft_channels=4, backend=backend
        )
        gradients.append(torch.autograd.grad(y, x, given.grad)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", ["x", "alpha", "beta", "source"])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_each_gradient_alone(backend: str, wanted: str):
    case = Case(8, (2, 6, 5), 3, soft=4, source_channels=3)
    given = inputs(case, device_of(backend))
    names = {"x": "dx", "alpha": "dalpha", "beta": "dbeta", "source": "dsource"}
    tensors = {name: getattr(given, name).detach() for name in names}
    leaf = tensors[wanted].requires_grad_()
    y = shared_relu(
        tensors["x"], given.channel_map, tensors["alpha"], tensors["beta"], source=tensors["source"],
        soft_channels=4, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(y, leaf, given.grad)
    assert torch.equal(gradient, getattr(run(case, given, backend), names[wanted]))


def test_no_gradient_is_no_graph():
    given = inputs(Case(9, (2, 6, 5), 3))
    assert shared_relu(given.x, given.channel_map, given.alpha, given.beta).grad_fn is None


def test_a_changed_x_is_noticed_in_backward():
    given = inputs(Case(10, (2, 6, 5), 3))
    x = given.x.clone().requires_grad_()
    hidden = x * 1
    y = shared_relu(hidden, given.channel_map, given.alpha, given.beta)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    given = inputs(Case(11, (2, 6, 5), 3))
    x = given.x.detach().requires_grad_()
    y = shared_relu(x, given.channel_map, given.alpha, given.beta, soft_channels=6)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_function_transforms_are_refused(transform):
    given = inputs(Case(12, (4, 6, 6), 3))  # fits with and without the mapped dimension

    def call(x: Tensor) -> Tensor:
        return shared_relu(x, given.channel_map, given.alpha, given.beta).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        transform(call)(given.x)


def test_forward_mode_is_refused():
    given = inputs(Case(14, (2, 6, 5), 3))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(given.x, given.grad)
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            shared_relu(x, given.channel_map, given.alpha, given.beta)


def test_gamma_gets_no_gradient():
    given = inputs(Case(15, (2, 6, 5), 3))
    gamma = torch.tensor(2.0, requires_grad=True)
    alpha = given.alpha.requires_grad_()
    shared_relu(given.x, given.channel_map, alpha, given.beta, soft_channels=4, gamma=gamma).sum().backward()
    assert gamma.grad is None
    assert alpha.grad.any()
