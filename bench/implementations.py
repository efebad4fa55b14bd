"""What stands side by side in a benchmark: y of x, alpha, beta, for hard gates of the tensor itself."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepshare import ChannelMap, shared_relu
from deepshare.raw_ops import backends

Activation = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(channel_map: ChannelMap) -> Activation:
    """The equation as a user would compose it."""

    def activate(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        gate = (x.index_select(1, channel_map.pi) >= 0).to(x.dtype)
        return x * (alpha.view(1, -1, 1, 1).to(x.dtype) * gate + beta.view(1, -1, 1, 1).to(x.dtype))

    return activate


def ours(channel_map: ChannelMap, backend: str) -> Activation:
    def activate(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return shared_relu(x, channel_map, alpha, beta, backend=backend)

    return activate


def compared(channel_map: ChannelMap, device: str) -> Iterator[tuple[str, Activation]]:
    """(name, activation): the floor (clone), torch.relu, the composition eager and compiled, and our backends."""
    yield "clone", lambda x, alpha, beta: x.clone()
    yield "relu", lambda x, alpha, beta: torch.relu(x)
    yield "eager", eager(channel_map)
    yield "compile", torch.compile(eager(channel_map), fullgraph=True, dynamic=False)
    for backend in ("cpu",) if device == "cpu" else ("triton", "cuda"):
        if backends()[backend] is None:
            yield backend, ours(channel_map, backend)


NAMES = ("clone", "relu", "eager", "compile", "cpu", "triton", "cuda")
