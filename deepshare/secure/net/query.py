"""The client's process: holds the images, and alone learns their logits."""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deepshare.files import write_whole
from deepshare.secure.engine.inference import Inference
from deepshare.secure.engine.party import Client
from deepshare.secure.engine.protocol import CLIENT, Protocol
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode
from deepshare.secure.net import messages
from deepshare.secure.net.connect import Address
from deepshare.secure.net.keys import Identity
from deepshare.secure.net.session import Log, Session, open_session
from deepshare.secure.net.supply import FromDealer, Supply, agree_at_client, disk_supply

MOST_PROTOCOL_BYTES = 1 << 28
MOST_WEIGHT_BYTES = 1 << 34
KEPT_WEIGHTS = 4  # model versions whose masked weights stay in the cache


@dataclass(frozen=True)
class Welcome:
    """What the server says before the first inference.

    Attributes:
        protocol: program and settings.
        size, mean, std: of the images.
        version: of the model; `live`: whether the server's tickets come from the dealer.
        weights: SHA-256 of the masked weights.
    """

    protocol: Protocol
    size: tuple[int, ...]
    mean: list[float]
    std: list[float]
    version: str
    live: bool
    weights: str


@dataclass(frozen=True)
class Answer:
    """Logits of all images, and what they cost this party.

    Attributes:
        labels: int64 [N].
        logits: float64 [N, classes]; None where the protocol reveals labels alone.
        rounds, sent, received: of all inferences, online; payload bytes.
        seconds_offline: for tickets and what is computed before the images; seconds_online: from images to logits.
    """

    labels: Tensor
    logits: Tensor | None
    inferences: int
    rounds: int
    sent: int
    received: int
    seconds_offline: float
    seconds_online: float


def receive_welcome(session: Session) -> Welcome:
    """Waits for this query's turn. Raises SecureError if the server is gone or says what no server says."""
    channel = session.channel
    _, content = messages.receive(channel, "welcome")
    _, text = messages.receive_bytes(channel, "program", MOST_PROTOCOL_BYTES)
    protocol = Protocol.from_json(str(text, "utf-8", "replace"))
    size = tuple(messages.numbers(channel, content, "size", int))
    mean, std = (messages.numbers(channel, content, name) for name in ("mean", "std"))
    if size != protocol.program.steps[0].shape or not len(mean) == len(std) == size[0]:
        raise SecureError(f"secure: {channel.peer} described images that do not fit its network")
    return Welcome(
        protocol=protocol,
        size=size,
        mean=mean,
        std=std,
        version=messages.text(channel, content, "version"),
        live=bool(content.get("live")),
        weights=messages.text(channel, content, "weights"),
    )


def client_supply(identity: Identity, welcome: Welcome, dealer: Address | None, material: Path | None) -> Supply:
    """The client's tickets, from where the server has its own.

    Raises:
        SecureError: that is not given, the dealer is not there, or the folder is of another deal.
    """
    if (dealer if welcome.live else material) is None:
        wanted = "--dealer HOST:PORT" if welcome.live else "--material DIR"
        raise SecureError(f"secure query: needs {wanted}: that is where the server's material comes from")
    if material is not None and not welcome.live:
        return disk_supply(material, CLIENT, identity.folder, welcome.protocol, welcome.version)
    assert dealer is not None
    return FromDealer(open_session(dealer, identity, "dealer"), welcome.protocol, welcome.version, CLIENT)


def receive_weights(session: Session, welcome: Welcome, cache: Path) -> dict[str, Tensor]:
    """The masked weights: from the cache if this version's are there, else from the server, once."""
    channel = session.channel
    known = _from_cache(cache, welcome.weights)
    messages.send(channel, "weights", have=known is not None)
    if known is None:
        _, data = messages.receive_bytes(channel, "weights", MOST_WEIGHT_BYTES)
        known = bytes(data)
        if hashlib.sha256(known).hexdigest() != welcome.weights:
            raise SecureError(f"secure: {channel.peer} sent other weights than it announced")
        _to_cache(cache, welcome.weights, known)
    try:
        return safetensors.torch.load(known)
    except (safetensors.SafetensorError, ValueError) as error:
        raise SecureError(f"secure: {channel.peer} sent weights that cannot be read") from error


def ask(
    session: Session,
    supply: Supply,
    client: Client,
    images: Tensor,  # int64 [N, C, H, W], 16 fractional bits
    log: Log,
) -> Answer:
    """Runs all images, a batch an inference; the last batch is filled up with zeros.

    Raises:
        SecureError: the server or the dealer is gone, or no ticket is left.
    """
    batch = client.protocol.settings.batch
    results, ran = [], []
    offline = online = 0.0
    for part in images.split(batch):
        began = time.perf_counter()
        inference = _prepare(session, supply, client, log)
        prepared = time.perf_counter()
        filled = torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
        result = inference.run(filled)
        assert result is not None, "the client learns the logits"
        offline, online = offline + prepared - began, online + time.perf_counter() - prepared
        results.append(result[: len(part)])
        ran.append(inference)
    messages.send(session.channel, "end")
    spent = [action for inference in ran for action in inference.spent]
    costs: dict[str, Any] = {name: sum(getattr(a, name) for a in spent) for name in ("rounds", "sent", "received")}
    opened = torch.cat(results)
    logits = None if client.protocol.program.reveals == "label" else decode(opened)
    labels = opened.flatten() if logits is None else logits.flatten(1).argmax(1)
    return Answer(labels, logits, len(ran), **costs, seconds_offline=offline, seconds_online=online)


def _prepare(session: Session, supply: Supply, client: Client, log: Log) -> Inference:
    messages.send(session.channel, "infer")
    number = agree_at_client(session.channel, supply)
    ticket = supply.take(number)
    log(f"ticket {number}")
    return client.prepare(ticket, session.channel)


def default_cache() -> Path:
    """$XDG_CACHE_HOME/deepshare, by default ~/.cache/deepshare."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "deepshare"


def _from_cache(cache: Path, sha256: str) -> bytes | None:
    try:
        data = _cached(cache, sha256).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _to_cache(cache: Path, sha256: str, data: bytes) -> None:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(_cached(cache, sha256), data, mode=0o600)
    kept = sorted(cache.glob("*.masked"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[KEPT_WEIGHTS:]:
        path.unlink(missing_ok=True)


def _cached(cache: Path, sha256: str) -> Path:
    """Named by a hash of what the server says, so that no server chooses a path."""
    return cache / f"{hashlib.sha256(sha256.encode()).hexdigest()}.masked"
