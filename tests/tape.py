"""A captured graph on the CPU: what a CUDA graph keeps of a piece of work, and what its replay does."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    """Notes every operation with its arguments: tensors by identity, all else as the constant it was."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        """The same operations on the same memory."""
        for func, args, kwargs, old in self.operations:
            new = func(*args, **kwargs)
            inputs = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            for kept, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(kept, Tensor) and _storage(kept) not in inputs:  # neither a view nor in place
                    kept.copy_(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


class TapeRecorder:
    """deepshare.train.step.Recorder by a tape.

    state: tensors that the work changes, as they are when it is called; recording must leave them alone
    """

    def __init__(self, state: Callable[[], Sequence[Tensor]]) -> None:
        self.state = state
        self.calls: list[str] = []

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        self.calls.append("run")
        return work()

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.calls.append("capture")
        tensors = list(self.state())
        before = [value.detach().clone() for value in tensors]
        with _Tape() as tape:
            result = work()
        with torch.no_grad():
            for value, old in zip(tensors, before, strict=True):
                value.copy_(old)

        def replay() -> Tensor:
            self.calls.append("replay")
            with torch.inference_mode():  # some of the work may have been done in it
                tape.play()
            return result

        return replay
