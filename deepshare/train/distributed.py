"""Several processes that train one network, as torchrun starts them (docs/training.md, "Several processes")."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from inspect import signature
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepshare.train.errors import TrainingError
from deepshare.train.heartbeat import Heartbeat
from deepshare.train.synced_batch_norm import synced

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
TIMEOUT = "DEEPSHARE_RANK_TIMEOUT"  # seconds that a rank waits for the others
# Buffers are left alone in every step: the switch is the same everywhere, and synced statistics are too. torch 2.13
# has a new name for the setting.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
_NOT_YET = "not yet"
_joins = count()
_joined: list["Ranks"] = []  # the ranks of this process while they are joined: a group is per process


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; world 1: it is alone, and everything here costs nothing.

    rank: its number, 0 .. world - 1; 0 writes all files and says all that is said
    device: of its own ("cpu", "cuda:1"), None when alone
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """What Batches takes: (rank, world)."""
        return self.rank, self.world

    def agree(self, work: Callable[[], T]) -> T:
        """`work()` of every rank; where it fails on one, every rank raises that error (the lowest rank's)."""
        if self.world == 1:
            return work()
        result: T
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        mine = None if error is None else _in_parts(error)
        told = self._gather(mine)
        while told[0] == _NOT_YET:
            told = self._gather(mine)
        first = next((rank for rank, said in enumerate(told) if said is not None), None)
        if first is None:
            return result
        if error is None or first != self.rank:
            error = _again(*told[first])
        if not self.is_writer:
            error.told_elsewhere = True  # type: ignore[attr-defined]
        raise error

    def from_writer(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, a value that pickles, on every rank; an error of it too. The others wait for it."""
        result = self.agree(lambda: work() if self.is_writer else None)
        return result if self.world == 1 else self._gather(result)[0]  # type: ignore[return-value]

    def not_yet(self) -> None:
        """Inside the work of from_writer: tell the others to wait on, where it may take longer than their timeout."""
        if self.world > 1:
            self._gather(_NOT_YET)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor of integers: exact."""
        if self.world > 1:
            values = values.cpu()
            dist.all_reduce(values)
        return values

    def mean(self, value: float) -> float:
        """The mean over ranks, the same bits on each."""
        if self.world == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(values)
        return float(values) / self.world

    def parallel(self, model: nn.Module, *, sync_batch_norm: bool) -> nn.Module:
        """`model` for training: its backward pass leaves the gradient of the whole batch in every parameter.

        Rank 0's parameters and buffers are copied to the others first. The result shares parameters and buffers with
        `model`; with `sync_batch_norm` its statistics are over the whole batch too.
        """
        if self.world == 1:
            return model
        assert self.device is not None
        twin = synced(model, self.device) if sync_batch_norm else model
        settings: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(twin, **settings)

    def take_buffers(self, model: nn.Module) -> None:
        """Rank 0's floating buffers on every rank, where statistics were not synced: all have one network then."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)

    def check_share(self, batch_size: int, key: str, *, sync_batch_norm: bool) -> None:
        """Raises ValueError, which names both numbers, unless each rank can have an equal part of a batch."""
        if batch_size % self.world:
            raise ValueError(f"{key}: wanted a multiple of the {self.world} processes that share it, got {batch_size}")
        if batch_size == self.world > 1 and not sync_batch_norm:
            raise ValueError(
                f"{key}: wanted at least 2 images for each of the {self.world} processes where batch norms are not "
                f"synced, got {batch_size}"
            )

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether rank 0 has this error too and tells it."""
    cause = error.__cause__
    return getattr(error, "told_elsewhere", False) or (cause is not None and is_told_elsewhere(cause))


def _in_parts(error: Exception) -> tuple[type[Exception], str, Any, dict[str, Any]]:
    """What `_again` makes the error from: (its class, its text, its arguments, its attributes)."""
    parts = type(error), str(error), error.args, vars(error)
    try:
        pickle.dumps(parts)
    except Exception:  # an argument or attribute that cannot travel
        return TrainingError, f"{type(error).__name__}: {error}", (f"{type(error).__name__}: {error}",), {}
    return parts


def _again(kind: type[Exception], text: str, arguments: Any, attributes: dict[str, Any]) -> Exception:
    """An error like the one of another rank, without a call of its class, which may want other arguments."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    vars(error).update(attributes)
    return error if str(error) == text else TrainingError(f"{kind.__name__}: {text}")


def _environment(variables: Mapping[str, str]) -> dict[str, int]:
    """torchrun's numbers, those of a lone process where WORLD_SIZE is not set. Raises TrainingError."""
    if "WORLD_SIZE" not in variables:
        return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    found = {}
    for name in VARIABLES:
        text = variables.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise TrainingError(f"{name}: wanted a number, as torchrun sets it beside WORLD_SIZE, got {text!r}")
        found[name] = int(text)
    for rank, world in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if not found[rank] < found[world]:
            raise TrainingError(f"{rank}: wanted less than {world} ({found[world]}), got {found[rank]}")
    return found


@contextmanager
def joined(device: str | torch.device | None = None) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, and part from them at the end; entered again inside, the same.

    device: as `train` takes it. On "cuda" (or by default, where there is a GPU) rank r of a machine has cuda:r and
        gradients go through NCCL; ranks that are given one device with a number share it and go through gloo.

    Raises TrainingError: they do not all come, or one of them is gone (it died, or hangs for longer than the timeout).
    """
    numbers = _environment(os.environ)
    if _joined or numbers["WORLD_SIZE"] == 1:
        yield _joined[-1] if _joined else Ranks()
        return
    place, backend = _place(device, numbers)
    ranks, timeout = Ranks(numbers["RANK"], numbers["WORLD_SIZE"], place), _timeout()
    store = dist.PrefixStore(f"deepshare/{next(_joins)}", _meet(ranks, backend, timeout))
    with Heartbeat(dist.PrefixStore("heart", store), ranks.rank, ranks.world) as heart, _named(heart, ranks):
        try:
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
            _joined.append(ranks)
            yield ranks
            ranks.agree(lambda: None)  # none leaves before all are at the end
        finally:
            _joined.clear()
            if dist.is_initialized():
                dist.destroy_process_group()


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT, "600")
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**7):
        raise TrainingError(f"{TIMEOUT}: wanted seconds, a whole number from 1, got {text!r}")
    return timedelta(seconds=int(text))


def _place(device: str | torch.device | None, numbers: Mapping[str, int]) -> tuple[torch.device, str]:
    """This rank's device and what its group talks through. Objects and counts always go through gloo."""
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise TrainingError(f"device {str(device)!r} cannot be used here: {error}") from error
    if wanted.type != "cuda":
        return wanted, "gloo"
    if wanted.index is not None:
        shared = numbers["LOCAL_WORLD_SIZE"] > 1
        return wanted, "gloo" if shared else "cpu:gloo,cuda:nccl"  # NCCL takes no two ranks on one GPU
    if numbers["LOCAL_WORLD_SIZE"] > torch.cuda.device_count():
        raise TrainingError(
            f"device 'cuda': wanted a GPU for each of the {numbers['LOCAL_WORLD_SIZE']} processes on this machine, "
            f"it has {torch.cuda.device_count()}; start fewer, or name one for all to share (cuda:0)"
        )
    return torch.device("cuda", numbers["LOCAL_RANK"]), "cpu:gloo,cuda:nccl"


@lru_cache(maxsize=1)
def _store(timeout: timedelta) -> dist.Store:
    """The store at torchrun's address, one for all the groups of this process: the port can be taken once."""
    return next(dist.rendezvous("env://", timeout=timeout))[0]


def _meet(ranks: Ranks, backend: str, timeout: timedelta) -> dist.Store:
    if ranks.device is not None and ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    try:
        return _store(timeout)
    except (dist.DistError, ValueError) as error:
        raise TrainingError(f"rank {ranks.rank} found not all {ranks.world} processes: {error}") from error


@contextmanager
def _named(heart: Heartbeat, ranks: Ranks) -> Iterator[None]:
    """Turns what a collective raises into who is gone; other errors pass."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        gone = heart.gone()
        if gone:
            who = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
            text = f"{who} gone (seen by rank {ranks.rank} of {ranks.world})"
            raise TrainingError(f"{text}; the run can be resumed, with any number of processes") from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise TrainingError(f"rank {ranks.rank} of {ranks.world} lost the others: {error}") from error
        raise
