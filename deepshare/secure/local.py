"""The engine on this machine: server, client and dealer as processes of their own, over plain TCP on loopback."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepshare.secure.engine.protocol import Protocol
from deepshare.secure.processes import STALL_SECONDS, Progress, Task, run_tasks

LABELS = ("party 0 (server)", "party 1 (client)", "the dealer")
TRANSPORT = "loopback, TCP without TLS"


@dataclass(frozen=True)
class Measured:
    """What the processes gave back: the parties as `local_party.work` returns it, seconds of dealing per inference."""

    server: dict[str, Any]
    client: dict[str, Any]
    dealing: list[float]
    logits: Tensor  # int64 [N, ...]


def run_engine(
    protocol: Protocol,
    tensors: dict[str, Tensor],
    images: Tensor,  # int64 [N, C, H, W], 16 fractional bits
    *,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress | None = None,
) -> Measured:
    """Runs `images` in batches of the protocol's size; a last short batch is filled up with zeros.

    Raises:
        SecureError: as `run_tasks`.
    """
    batch, count = protocol.settings.batch, -(-len(images) // protocol.settings.batch)
    filled = torch.cat([images, images.new_zeros(count * batch - len(images), *images.shape[1:])])
    given = {"protocol": protocol.to_json(), "count": count}

    def tasks(_: Path) -> list[Task]:
        parties, to_server, to_client = _tcp_pair(), _tcp_pair(), _tcp_pair()
        own = {"images": filled.reshape(count, batch, *images.shape[1:])}
        module = "deepshare.secure.local_party"
        return [
            Task(LABELS[0], module, {**given, "tensors": tensors}, (parties[0], to_server[0])),
            Task(LABELS[1], module, {**given, **own}, (parties[1], to_client[0])),
            Task(
                LABELS[2],
                "deepshare.secure.dealer.process",
                {**given, "count": count + 1},
                (to_server[1], to_client[1]),
            ),
        ]

    server, client, dealer = run_tasks(tasks, stall_seconds=stall_seconds, progress=progress, images=len(images))
    return Measured(server, client, dealer["dealing"][1:], client["logits"].flatten(0, 1)[: len(images)])


def _tcp_pair() -> tuple[int, int]:
    """Descriptors of two connected sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    for end in (first, second):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return first.detach(), second.detach()
