"""Several processes on this machine that meet as torchrun's do, each running one function of a test module."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# What a training process imports, once for all: children are forked from a process that has them.
IMPORTS = ["pytest", "deepshare.train", "deepshare.train.distributed", "kornia.augmentation", "sklearn.datasets"]
IMPORTS += ["torch._dynamo"]  # DistributedDataParallel's, late


class Ended(NamedTuple):
    """How a rank ended: what its function returned, or its error as text; its exit code."""

    value: Any
    error: str | None
    exitcode: int


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, seconds: int = 30) -> list[Ended]:
    """`function(*arguments)` in `world` processes with torchrun's variables; a rank waits `seconds` for the others.

    A process that is killed, or returns what does not pickle, has value None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = []
    for rank, (_, sender) in enumerate(pipes):
        variables = {**variables_of(rank, world, port), "DEEPSHARE_RANK_TIMEOUT": str(seconds)}
        ranks.append(context.Process(target=_child, args=(variables, sender, function, arguments)))
        ranks[-1].start()
        sender.close()
    ended = []
    for process, (receiver, _) in zip(ranks, pipes, strict=True):
        value, error = _received(receiver)
        process.join()
        assert process.exitcode is not None
        ended.append(Ended(value, error, process.exitcode))
    return ended


def variables_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of `world` processes on one machine."""
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _received(receiver: Connection) -> tuple[Any, str | None]:
    try:
        return receiver.recv()
    except EOFError:
        return None, None


def _child(variables: dict[str, str], sender: Connection, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        said = function(*arguments), None
    except Exception as error:
        said = None, f"{type(error).__name__}: {error}"
    sender.send(said)
