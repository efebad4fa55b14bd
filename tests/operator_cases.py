"""Random cases of shared_relu, and the bounds within which two implementations of it must agree.

A case is drawn from its number alone, so a failure is repeated by `random_case(number)`.
"""

import math
import os
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepshare import ChannelMap, shared_relu
from deepshare.raw_ops import backends

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GATE_ERROR = 8.0  # see `bounds`


def backend_parameters() -> list:
    """The compiled backends as pytest parameters; a missing one is skipped with its reason, but never where CI
    demanded the native build."""
    required = os.environ.get("DEEPSHARE_BUILD") == "require"
    parameters = []
    for name in ("cpu", "triton", "cuda"):
        reason = backends()[name]
        marks = [pytest.mark.gpu] if name == "cuda" or (name == "triton" and not INTERPRETED) else []
        if reason is not None and not (required and name == "cpu"):
            marks.append(pytest.mark.skip(reason=f"backend {name}: {reason}"))
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def device_of(backend: str) -> str:
    on_gpu = backend == "cuda" or (backend == "triton" and not INTERPRETED)
    return "cuda" if on_gpu else "cpu"


def truncates(backend: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter converts float32 to bfloat16 by truncation: off by one unit in the last place."""
    return backend == "triton" and INTERPRETED and dtype == torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What a call of shared_relu looks like; `inputs` makes its tensors."""

    seed: int
    shape: tuple[int, ...]
    prototypes: int
    map_kind: str = "balanced"  # balanced | random | one
    dtype: torch.dtype = torch.float32
    x_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    source_layout: str = "contiguous"
    source_channels: int | None = None
    soft: int = 0
    soft_as_tensor: bool = False
    gamma: float = 1.0
    affine_dtype: torch.dtype = torch.float32
    integers: bool = False  # values -4..4: sums of hard cases are exact in float32, whatever their order

    @property
    def is_hard(self) -> bool:
        """Whether the hard path is chosen: the int 0."""
        return self.soft == 0 and not self.soft_as_tensor


@dataclass
class Inputs:
    x: Tensor
    grad: Tensor
    source: Tensor | None
    alpha: Tensor
    beta: Tensor
    channel_map: ChannelMap


@dataclass
class Result:
    """y and every gradient; dsource is None where nothing flows into the source."""

    y: Tensor
    dx: Tensor
    dsource: Tensor | None
    dalpha: Tensor
    dbeta: Tensor


def random_case(number: int, largest: int = 6000) -> Case:
    """Case `number`: 1 to `largest` elements in 2 to 5 dimensions, one in 50 of 1x1x1x1, all else drawn freely."""
    draw = random.Random(number)
    shape = (draw.choice([1, 1, 2, 3, 5]), draw.choice([1, 2, 3, 4, 5, 7, 8, 12, 16, 33, 64, 129]))
    for _ in range(draw.choice([0, 1, 2, 2, 2, 3])):
        room = largest // math.prod(shape)
        shape += (draw.choice([s for s in (1, 2, 3, 4, 7, 8, 15, 16, 33, 129) if s <= room] or [1]),)
    shape = (1, 1, 1, 1) if number % 50 == 0 else shape
    channels = shape[1]
    prototypes = draw.choice([1, channels, draw.randint(1, channels), draw.randint(1, channels)])
    soft = draw.choice([0, 0, 0, channels, draw.randint(0, channels), draw.randint(0, channels)])
    return Case(
        seed=number,
        shape=shape,
        prototypes=prototypes,
        map_kind=draw.choice(["balanced", "random", "random", "one"]),
        dtype=draw.choice(DTYPES),
        x_layout=draw.choice(LAYOUTS),
        grad_layout=draw.choice(LAYOUTS),
        source_layout=draw.choice(LAYOUTS),
        source_channels=draw.choice([None, None, prototypes, prototypes + draw.randint(0, 5)]),
        soft=soft,
        soft_as_tensor=draw.random() < 0.5,
        gamma=draw.choice([1.0, 4.0, 0.37]),
        affine_dtype=draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    )


def laid_out(values: Tensor, layout: str, draw: random.Random) -> Tensor:
    """`values` (or, expanded, values repeated along one dimension) stored as `layout` says."""
    rank = values.dim()
    if layout == "channels_last":
        return _stored_in(values, [0, *range(2, rank), 1])
    if layout == "permuted":
        return _stored_in(values, draw.sample(range(rank), rank))
    if layout == "sliced":
        unread = math.nan if values.is_floating_point() else 77
        wide = torch.full([2 * s + 1 for s in values.shape], unread, dtype=values.dtype, device=values.device)
        inside = wide[tuple(slice(1, 2 * s + 1, 2) for s in values.shape)]
        return inside.copy_(values)
    if layout == "expanded":
        dim = draw.randrange(rank)
        return values.narrow(dim, 0, min(1, values.shape[dim])).expand(values.shape) if values.numel() else values
    return values.contiguous()


def _stored_in(values: Tensor, order: list[int]) -> Tensor:
    return values.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case: normal values, of which one in 16 is 0 and one in 16 is -0.0."""
    generator = torch.Generator().manual_seed(case.seed)
    draw = random.Random(case.seed)
    channels = case.shape[1]

    def normal(shape: tuple[int, ...], layout: str) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if case.integers:
            values = values.mul(2).round().clamp(-4, 4)
        zeros = torch.randint(0, 16, shape, generator=generator)
        values = values.masked_fill(zeros == 0, 0.0).masked_fill(zeros == 1, -0.0)
        return laid_out(values.to(device, case.dtype), layout, draw)

    pi = torch.arange(channels) % case.prototypes
    if case.map_kind == "random":
        pi = torch.randint(0, case.prototypes, (channels,), generator=generator)
    elif case.map_kind == "one":
        pi = torch.full((channels,), case.prototypes - 1)
    source = None
    if case.source_channels is not None:
        source = normal((case.shape[0], case.source_channels, *case.shape[2:]), case.source_layout)
    alpha, beta = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    affine_dtype = torch.float64 if case.dtype == torch.float64 else case.affine_dtype
    return Inputs(
        x=normal(case.shape, case.x_layout),
        grad=normal(case.shape, case.grad_layout),
        source=source,
        alpha=alpha.to(device, affine_dtype),
        beta=beta.to(device, affine_dtype),
        channel_map=ChannelMap(pi, case.prototypes).to(device),
    )


def run(case: Case, given: Inputs, backend: str) -> Result:
    """Forward and backward through the public function, on leaves that share the given tensors' memory."""
    x, alpha, beta = (t.detach().requires_grad_() for t in (given.x, given.alpha, given.beta))
    source = None if given.source is None else given.source.detach().requires_grad_()
    soft = torch.tensor(case.soft, dtype=torch.int32, device=x.device) if case.soft_as_tensor else case.soft
    y = shared_relu(
        x, given.channel_map, alpha, beta, source=source, soft_channels=soft, gamma=case.gamma, backend=backend
    )
    leaves = [x, alpha, beta] + ([] if source is None else [source])
    dx, dalpha, dbeta, *rest = torch.autograd.grad(y, leaves, given.grad, allow_unused=True)
    return Result(y.detach(), dx, rest[0] if rest else None, dalpha, dbeta)


def bounds(case: Case, given: Inputs, expected: Result, truncating: bool) -> Result:
    """How far an implementation may be from the reference, element by element.

    With eps the spacing of the accumulation dtype at 1 (half of it for a rounding), both sides rounding on their own:
    - hard gates are exact, alpha * gate is exact, so y and dx are correctly rounded twice in a fixed order: bit-equal.
    - a soft gate 0.5 * (1 + erf(z)) differs by at most GATE_ERROR * eps: z = gamma * v / sqrt(2) carries two
      roundings, which phi(z) * |z| <= 0.25 damps; erf is within 2 units in the last place (CUDA's bound); 1 + erf and
      the halving round once more: below 4 eps a side.
    - the density phi likewise: |d phi| <= z^2 phi(z) * 3 eps/2 plus 2 units in the last place of exp: below 4 eps.
    - each of the up to 4 roundings around a gate adds eps/2 a side: 4 eps of the terms' size.
    - a sum of n terms in any order: sqrt(n) * eps/2 * lambda a side of the sum of |terms| (Higham and Mary 2019,
      probability of failure 2 exp(-lambda^2/2)), lambda = 6: 6 sqrt(n) eps for two sides.
    - results of 16 bits may fall to either side of a rounding boundary where the wide values differ at all: one unit.
    """
    eps = torch.finfo(expected.dalpha.dtype if case.dtype == torch.float64 else torch.float32).eps
    x, grad = given.x.double().abs(), given.grad.double().abs()
    column = (1, -1) + (1,) * (x.dim() - 2)
    alpha, beta = (t.detach().double().abs().reshape(column) for t in (given.alpha, given.beta))
    soft = (torch.arange(case.shape[1], device=x.device) < case.soft).reshape(column).double()
    positions = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // max(case.shape[1], 1)
    summing = 6 * math.sqrt(max(count, 1)) * eps
    terms = (x * grad).sum(positions)
    gate_terms = (x * grad * soft).sum(positions)
    size = 0.4 * case.gamma * soft * alpha * x * grad  # of the terms that flow through soft gates; phi <= 0.4
    pi = given.channel_map.pi.long()
    members = torch.bincount(pi, minlength=case.prototypes).max().item()
    into = x if given.source is None else given.source
    flowing = torch.zeros(into.shape, dtype=torch.float64, device=x.device).index_add(1, pi, size)
    through = flowing * (6 * math.sqrt(members) + 2 * GATE_ERROR) * eps
    wide_y = soft * x * (alpha + beta) * (GATE_ERROR + 4) * eps
    wide_dx = soft * grad * (alpha + beta) * (GATE_ERROR + 4) * eps
    if given.source is None:
        wide_dx = wide_dx + through + 2 * eps * torch.where(flowing > 0, grad * (alpha + beta), 0.0)
    affine_unit = torch.finfo(given.alpha.dtype).eps if given.alpha.dtype == torch.bfloat16 else 0.0
    return Result(
        y=_rounded(wide_y, expected.y, truncating),
        dx=_rounded(wide_dx, expected.dx, truncating),
        dsource=None if expected.dsource is None else _rounded(through, expected.dsource, truncating),
        dalpha=terms * (summing + 2 * eps)
        + gate_terms * GATE_ERROR * eps
        + affine_unit * expected.dalpha.double().abs(),
        dbeta=terms * (summing + 2 * eps) + affine_unit * expected.dbeta.double().abs(),
    )


def _rounded(wide: Tensor, expected: Tensor, truncating: bool) -> Tensor:
    """Add one unit of the result's dtype wherever the wide values may differ, or everywhere if it is truncated."""
    info = torch.finfo(expected.dtype)
    unit = info.eps * expected.double().abs() + info.smallest_normal * info.eps
    if info.bits > 16:
        return wide
    return torch.where(wide > 0, wide + unit, unit if truncating else 0.0)


def assert_agrees(case: Case, given: Inputs, ours: Result, expected: Result, truncating: bool) -> None:
    """Values within `bounds`, dtypes and strides as the contract says."""
    limits = bounds(case, given, expected, truncating)
    for name in ("y", "dx", "dsource", "dalpha", "dbeta"):
        got, wanted, limit = (getattr(result, name) for result in (ours, expected, limits))
        if wanted is None:
            assert got is None, f"{case}: {name} must be None"
            continue
        assert got.dtype == wanted.dtype, f"{case}: {name} is {got.dtype}, the reference {wanted.dtype}"
        assert got.shape == wanted.shape, f"{case}: {name} is {list(got.shape)}, the reference {list(wanted.shape)}"
        excess = (got.double() - wanted.double()).abs() - limit
        worst = excess.max().item() if excess.numel() else 0.0
        assert worst <= 0, f"{case}: {name} is {worst:g} beyond its bound (largest bound {limit.max().item():g})"
    for name, like in (("y", given.x), ("dx", given.x), ("dsource", given.source)):
        value = getattr(ours, name)
        if value is not None:
            assert value.stride() == torch.empty_like(like).stride(), f"{case}: strides of {name}"
