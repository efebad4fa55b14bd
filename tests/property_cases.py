"""What the property tests draw: a call in every detail, its tensors, and the oracle's operands for it."""

import math
import random
from dataclasses import dataclass

import numpy as np
import oracle
import torch
from hypothesis import strategies as st
from operator_cases import DTYPES, LAYOUTS, device_of, laid_out, truncates
from torch import Tensor

from deepshare import ChannelMap, PackedGates, pack_gates, shared_relu

MAPS = ("balanced", "identity", "one", "random", "shifted")
SPECIALS = ("none", "zeros", "small", "all")
TENSORS = ("x", "residual", "source", "grad")


@dataclass(frozen=True)
class Call:
    """A call of shared_relu. The numbers in its tensors follow from `seed`; everything else is drawn."""

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    prototypes: int
    map_kind: str
    layouts: tuple[str, ...]  # of TENSORS
    specials: str
    gates: str  # own | source | packed
    extra_channels: int  # of the source, beyond P
    with_residual: bool
    soft: int
    soft_as_tensor: bool
    gamma: float
    gamma_as_tensor: bool
    return_gates: bool
    affine: str  # relu | float32 | float64 | bfloat16


@dataclass
class Tensors:
    x: Tensor
    grad: Tensor
    residual: Tensor | None
    source: Tensor | None
    packed: PackedGates | None
    alpha: Tensor
    beta: Tensor
    channel_map: ChannelMap


@dataclass
class Outcome:
    y: Tensor
    gates: Tensor | PackedGates | None
    dx: Tensor
    dresidual: Tensor | None
    dsource: Tensor | None
    dalpha: Tensor
    dbeta: Tensor


@st.composite
def shapes(draw: st.DrawFn, largest: int) -> tuple[int, ...]:
    """[N, C, *S] of rank 2 to 5 with at most `largest` elements; a size may be 0 (never the channels) or 1."""
    rank = draw(st.sampled_from([4, 3, 5, 2]))
    channels = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33]))
    room = max(1, largest // channels)
    sizes = []
    for _ in range(rank - 1):
        size = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33, 65, 130, 0]))
        sizes.append(min(size, room))
        room = max(1, room // max(1, sizes[-1]))
    return (sizes[0], channels, *sizes[1:])


@st.composite
def calls(draw: st.DrawFn, largest: int) -> Call:
    shape = draw(shapes(largest))
    channels = shape[1]
    map_kind = draw(st.sampled_from(MAPS))
    prototypes = channels if map_kind == "identity" else draw(st.integers(1, channels))
    gates = draw(st.sampled_from(["own", "own", "source", "packed"]))
    soft = 0 if gates == "packed" else draw(st.one_of(st.just(0), st.just(channels), st.integers(0, channels)))
    soft_as_tensor = gates != "packed" and draw(st.booleans())
    if soft_as_tensor and draw(st.integers(0, 9)) == 0:
        soft = draw(st.sampled_from([-1, channels + 1, 2**30]))  # means the nearest in range
    dtype = draw(st.sampled_from(DTYPES))
    return Call(
        seed=draw(st.integers(0, 2**31 - 1)),
        shape=shape,
        dtype=dtype,
        prototypes=prototypes,
        map_kind=map_kind,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in TENSORS),
        specials=draw(st.sampled_from(SPECIALS)),
        gates=gates,
        extra_channels=draw(st.sampled_from([0, 0, 1, 4])),
        with_residual=draw(st.booleans()),
        soft=soft,
        soft_as_tensor=soft_as_tensor,
        gamma=draw(st.sampled_from([1.0, 0.37, 4.0])),
        gamma_as_tensor=draw(st.booleans()),
        return_gates=draw(st.booleans()),
        affine=draw(st.sampled_from(["relu", "float32", "float32", "float64", "bfloat16"])),
    )


def special_values(kind: str, dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    values: dict[str, list[float]] = {"none": [], "zeros": [0.0, -0.0]}
    values["small"] = [0.0, -0.0, subnormal, -subnormal, info.smallest_normal, -info.smallest_normal]
    values["all"] = [*values["small"], math.inf, -math.inf, math.nan, info.max, info.min]
    return values[kind]


class Maker:
    """Makes a call's tensors one after the other from its seed."""

    def __init__(self, seed: int, specials: str, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = random.Random(seed)
        self.specials, self.dtype, self.device = special_values(specials, dtype), dtype, device
        self.one_in = 24 if specials == "all" else 6

    def activation(self, shape: tuple[int, ...], layout: str) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.specials:
            chosen = torch.randint(0, len(self.specials), shape, generator=self.generator)
            here = torch.randint(0, self.one_in, shape, generator=self.generator) == 0
            values = torch.where(here, torch.tensor(self.specials, dtype=torch.float64)[chosen], values)
        return laid_out(values.to(self.device, self.dtype), layout, self.draw)

    def vector(self, channels: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(channels, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def map_of(self, channels: int, prototypes: int, kind: str) -> ChannelMap:
        every = torch.arange(channels)
        pi = {
            "balanced": every % prototypes,
            "identity": every % prototypes,
            "one": torch.full((channels,), prototypes - 1),
            "random": torch.randint(0, prototypes, (channels,), generator=self.generator),
            "shifted": (every + 1) % prototypes,  # no prototype maps to itself, where there are two
        }[kind]
        return ChannelMap(pi, prototypes).to(self.device)


def tensors_of(call: Call, backend: str) -> Tensors:
    maker = Maker(call.seed, call.specials, call.dtype, device_of(backend))
    layouts = dict(zip(TENSORS, call.layouts, strict=True))
    channels = call.shape[1]
    leader_shape = (call.shape[0], call.prototypes + call.extra_channels, *call.shape[2:])
    source = None if call.gates == "own" else maker.activation(leader_shape, layouts["source"])
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    affine_dtype = wide if call.affine == "relu" or wide == torch.float64 else getattr(torch, call.affine)
    alpha, beta = (maker.vector(channels, affine_dtype) for _ in range(2))
    if call.affine == "relu":
        alpha, beta = torch.ones_like(alpha), torch.zeros_like(beta)
    return Tensors(
        x=maker.activation(call.shape, layouts["x"]),
        grad=maker.activation(call.shape, layouts["grad"]),
        residual=maker.activation(call.shape, layouts["residual"]) if call.with_residual else None,
        source=source if call.gates == "source" else None,
        packed=pack_gates(source >= 0) if call.gates == "packed" and source is not None else None,
        alpha=alpha,
        beta=beta,
        channel_map=maker.map_of(channels, call.prototypes, call.map_kind),
    )


def run(call: Call, given: Tensors, backend: str) -> Outcome:
    """Forward and backward through the public function, on leaves that share the given tensors' memory."""
    x, alpha, beta = (t.detach().requires_grad_() for t in (given.x, given.alpha, given.beta))
    residual, source = (None if t is None else t.detach().requires_grad_() for t in (given.residual, given.source))
    soft = torch.tensor(call.soft, dtype=torch.int32, device=x.device) if call.soft_as_tensor else call.soft
    gamma = torch.tensor(call.gamma, device=x.device) if call.gamma_as_tensor else call.gamma
    leader = given.packed if given.packed is not None else source
    state = {"source": leader, "residual": residual, "soft_channels": soft, "gamma": gamma, "backend": backend}
    gates = None
    if call.return_gates:
        y, gates = shared_relu(x, given.channel_map, alpha, beta, return_gates=True, **state)
    else:
        y = shared_relu(x, given.channel_map, alpha, beta, **state)
    leaves = {"dx": x, "dalpha": alpha, "dbeta": beta, "dresidual": residual, "dsource": source}
    wanted = [t for t in leaves.values() if t is not None]
    found = iter(torch.autograd.grad(y, wanted, given.grad, allow_unused=True))
    gradients = {name: None if leaf is None else next(found) for name, leaf in leaves.items()}
    return Outcome(y.detach(), gates, **gradients)


def oracle_of(call: Call, given: Tensors, backend: str) -> oracle.SharedReLU:
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    gates = None if given.packed is None else given.packed.unpack().cpu().numpy()
    # Triton's interpreter truncates to bfloat16, and reads its subnormals as 0
    coarse = truncates(backend, call.dtype)
    return oracle.SharedReLU(
        x=oracle.numbers(given.x),
        pi=given.channel_map.pi.cpu().numpy().astype(np.int64),
        alpha=oracle.numbers(given.alpha.to(wide)),
        beta=oracle.numbers(given.beta.to(wide)),
        dtype=call.dtype,
        residual=None if given.residual is None else oracle.numbers(given.residual),
        source=None if given.source is None else oracle.numbers(given.source),
        hard_gates=gates,
        soft=min(max(call.soft, 0), call.shape[1]),
        # a number is taken in the accumulation dtype; a tensor is float32 here
        gamma=torch.tensor(call.gamma, dtype=torch.float32 if call.gamma_as_tensor else wide).item(),
        prototypes=call.prototypes,
        band=torch.finfo(call.dtype).smallest_normal if coarse else 0.0,
        extra_units=1.0 if coarse else 0.0,
        truncated_sum=coarse,
    )
