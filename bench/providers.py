"""What stands side by side: each form of the operator as PyTorch has it, eager and compiled, and as ours.

A form's functions take the same leaves; a backward pass is that of the leaves a function uses. Nothing here measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from shapes import LAYOUTS, Case
from torch import Tensor
from torch.nn import functional as F

from deepshare import ChannelMap, masked_relu, pack_gates, shared_relu, shared_relu_share

Function = Callable[..., Tensor]
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # ours, by the device of the tensors


@dataclass(frozen=True)
class Inputs:
    """A case's tensors: leaves get gradients, `given` do not."""

    leaves: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    channel_map: ChannelMap


# (inputs, backend): a function of the leaves. The backend is for functions made of our own operator; None: its default.
Maker = Callable[[Inputs, str | None], Function]


@dataclass(frozen=True)
class Form:
    """One form of the operator, ours beside what it is compared with; ratios are first of all to the baseline."""

    baseline: str
    inputs: Callable[[Case, str], Inputs]  # of a case and a device
    theirs: dict[str, Maker]
    ours: Maker
    directions: tuple[str, ...] = ("forward", "backward")


@cache
def compiled(function: Function) -> Function:
    """torch.compile of `function`, once: every case of it is one more entry in the same cache."""
    torch._dynamo.config.recompile_limit = 256
    # A backward pass is run again and again here; donated buffers allow it once.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def randn(case: Case, device: str, count: int) -> list[Tensor]:
    """`count` activations, normal values."""
    memory_format = LAYOUTS[case.layout]
    made = (torch.randn(case.shape.dimensions, device=device) for _ in range(count))
    return [values.to(case.dtype).contiguous(memory_format=memory_format) for values in made]


def balanced(case: Case, device: str) -> ChannelMap:
    return ChannelMap.balanced(case.shape.channels, case.shape.prototypes).to(device)


def activations(count: int) -> Callable[[Case, str], Inputs]:
    """Leaves: `count` activations, alpha, beta. Given: one more activation, a leader's."""

    def make(case: Case, device: str) -> Inputs:
        torch.manual_seed(0)
        *leaves, leader = randn(case, device, count + 1)
        alpha, beta = (torch.rand(case.shape.channels, device=device) for _ in range(2))
        return Inputs((*leaves, alpha, beta), (leader,), balanced(case, device))

    return make


def relu(inputs: Inputs, backend: str | None) -> Function:
    return lambda x, *others: torch.relu(x)


def ours(inputs: Inputs, backend: str | None) -> Function:
    """The plain form."""
    return lambda x, alpha, beta: shared_relu(x, inputs.channel_map, alpha, beta, backend=backend)


def composed(x: Tensor, alpha: Tensor, beta: Tensor, pi: Tensor) -> Tensor:
    """The equation as a user would write it."""
    gate = (x.index_select(1, pi) >= 0).to(x.dtype)
    wide_alpha, wide_beta = (values.view(1, -1, 1, 1).to(x.dtype) for values in (alpha, beta))
    return x * (wide_alpha * gate + wide_beta)


PLAIN = Form(
    baseline="relu",
    inputs=activations(1),
    theirs={
        "relu": relu,
        "eager": lambda inputs, _: lambda *leaves: composed(*leaves, inputs.channel_map.pi),
        "compile": lambda inputs, _: lambda *leaves: compiled(composed)(*leaves, inputs.channel_map.pi),
    },
    ours=ours,
)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def ours_after_addition(inputs: Inputs, backend: str | None) -> Function:
    plain = ours(inputs, backend)
    return lambda x, residual, alpha, beta: plain(x + residual, alpha, beta)


def ours_with_residual(inputs: Inputs, backend: str | None) -> Function:
    def function(x: Tensor, residual: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return shared_relu(x, inputs.channel_map, alpha, beta, residual=residual, backend=backend)

    return function


RESIDUAL = Form(
    baseline="relu",
    inputs=activations(2),
    theirs={
        "relu": lambda inputs, _: lambda x, residual, *affine: add_relu(x, residual),
        "compile": lambda inputs, _: lambda x, residual, *affine: compiled(add_relu)(x, residual),
        "unfused": ours_after_addition,
    },
    ours=ours_with_residual,
)


def ours_emitting(inputs: Inputs, backend: str | None) -> Function:
    def function(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return shared_relu(x, inputs.channel_map, alpha, beta, return_gates=True, backend=backend)[0]

    return function


EMIT = Form("plain", activations(1), {"plain": ours, "relu": relu}, ours_emitting, directions=("forward",))


def ours_from_source(inputs: Inputs, backend: str | None) -> Function:
    (leader,) = inputs.given
    return lambda x, alpha, beta: shared_relu(x, inputs.channel_map, alpha, beta, source=leader, backend=backend)


def ours_from_gates(inputs: Inputs, backend: str | None) -> Function:
    (leader,) = inputs.given
    gates = pack_gates(leader[:, : inputs.channel_map.prototypes] >= 0).repack(leader)
    return lambda x, alpha, beta: shared_relu(x, inputs.channel_map, alpha, beta, source=gates, backend=backend)


FOLLOWER = Form("source", activations(1), {"source": ours_from_source, "relu": relu}, ours_from_gates)


def ours_soft(inputs: Inputs, backend: str | None) -> Function:
    """Every channel soft, as in the GELU phase."""
    soft = torch.tensor(inputs.channel_map.channels, dtype=torch.int32, device=inputs.leaves[0].device)

    def function(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return shared_relu(x, inputs.channel_map, alpha, beta, soft_channels=soft, backend=backend)

    return function


SOFT = Form("gelu", activations(1), {"gelu": lambda inputs, _: lambda x, *affine: F.gelu(x)}, ours_soft)


def mask_inputs(case: Case, device: str) -> Inputs:
    """Leaves: an activation, a mask per pixel."""
    torch.manual_seed(0)
    (x,) = randn(case, device, 1)
    return Inputs((x, torch.rand(case.shape.dimensions[1:], device=device)), (), balanced(case, device))


def composed_mask(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(x.dtype)
    return weight * torch.relu(x) + (1 - weight) * x


MASKED = Form(
    baseline="eager",
    inputs=mask_inputs,
    theirs={
        "eager": lambda inputs, _: composed_mask,
        "compile": lambda inputs, _: compiled(composed_mask),
        "relu": relu,
    },
    ours=lambda inputs, backend: lambda x, mask: masked_relu(x, mask, backend=backend),
)


def share_inputs(case: Case, device: str) -> Inputs:
    """No leaves. Given: opened, flip, offset, toggle, alpha, beta, and the prototypes' gates (bool)."""
    torch.manual_seed(0)
    (batch, channels, *rest), memory_format = case.shape.dimensions, LAYOUTS[case.layout]

    def integers(*shape: int) -> Tensor:
        return torch.randint(-(2**62), 2**62, shape, device=device)

    tensors = [integers(batch, channels, *rest).contiguous(memory_format=memory_format) for _ in range(4)]
    gates = integers(batch, case.shape.prototypes, *rest).contiguous(memory_format=memory_format) >= 0
    return Inputs((), (*tensors, integers(channels), integers(channels), gates), balanced(case, device))


def composed_share(
    opened: Tensor, flip: Tensor, offset: Tensor, toggle: Tensor, alpha: Tensor, beta: Tensor, gates: Tensor, pi: Tensor
) -> Tensor:
    """Party 0's share, as a user would write it on int64 tensors."""
    bits = gates.index_select(1, pi).to(torch.int64)
    alpha, beta = alpha.view(1, -1, 1, 1), beta.view(1, -1, 1, 1)
    return (opened * (beta + flip + bits * (alpha - 2 * flip)) + offset + bits * toggle) >> 16


def ours_share(inputs: Inputs, backend: str | None) -> Function:
    opened, flip, offset, toggle, alpha, beta, gates = inputs.given
    arguments = (opened, pack_gates(gates).repack(opened), inputs.channel_map, alpha, beta, flip, offset, toggle)
    return lambda: shared_relu_share(*arguments, party=0, shift=16, backend=backend)


SHARE = Form(
    baseline="eager",
    inputs=share_inputs,
    theirs={
        "eager": lambda inputs, _: lambda: composed_share(*inputs.given, inputs.channel_map.pi),
        "compile": lambda inputs, _: lambda: compiled(composed_share)(*inputs.given, inputs.channel_map.pi),
    },
    ours=ours_share,
    directions=("forward",),
)

FORMS = {
    "plain": PLAIN,
    "residual": RESIDUAL,
    "emit": EMIT,
    "follower": FOLLOWER,
    "masked": MASKED,
    "soft": SOFT,
    "share": SHARE,
}
