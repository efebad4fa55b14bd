"""A party of the engine as a process of processes.py, on loopback: what a measured run consists of."""

import socket
import struct
import time
from typing import Any

import torch
from torch import Tensor

from deepshare.secure.child import Signals
from deepshare.secure.engine.inference import Inference
from deepshare.secure.engine.party import Client, Party, Server
from deepshare.secure.engine.protocol import Action, Protocol, Reveal
from deepshare.secure.engine.streams import KEY_BYTES
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.net.channel import Channel
from deepshare.secure.net.guard import forbid_dealer


def work(given: dict[str, Any], signals: Signals, sockets: tuple[int, ...]) -> dict[str, Any]:
    """Runs every batch, one ticket each, after one of zeros that warms up.

    Args:
        given: protocol (its text); at the server tensors, at the client images int64 [inferences, batch, C, H, W].
        sockets: to the other party, to the dealer.

    Returns:
        preparing, online: seconds per inference; spent: per inference and entry of the program's steps, the opening of
        the logits last, [rounds, bytes sent, seconds, of them waiting]; early, setup: bytes sent before the input, an
        inference and once; logits (client): int64 [inferences, batch, ...].

    Raises:
        ConnectionError: the other party or the dealer is gone.
    """
    forbid_dealer()
    try:
        return _Worker(given, signals, sockets).run()
    except SecureError as error:  # nothing else can fail here: what is given was checked before
        raise ConnectionError(str(error)) from error


class _Worker:
    def __init__(self, given: dict[str, Any], signals: Signals, sockets: tuple[int, ...]) -> None:
        self._signals = signals
        self._link = Channel(socket.socket(fileno=sockets[0]), "the other party")
        self._dealer = Channel(socket.socket(fileno=sockets[1]), "the dealer")
        self._protocol = Protocol.from_json(given["protocol"])
        self._images: Tensor | None = given.get("images")
        self._count: int = given["count"]
        self._tensors: dict[str, Tensor] = given.get("tensors", {})

    def run(self) -> dict[str, Any]:
        self._signals.progress("sharing the model")
        party, setup = self._party(), self._link.sent
        timed = [self._infer(party, number) for number in range(self._count + 1)][1:]
        return {
            "preparing": [one["preparing"] for one in timed],
            "online": [one["online"] for one in timed],
            "spent": [one["spent"] for one in timed],
            "early": timed[0]["early"],
            "setup": setup,
            "logits": None if self._images is None else torch.stack([one["logits"] for one in timed]),
        }

    def _party(self) -> Party:
        """The server sends what the client is given of the weights."""
        if self._images is None:
            key = bytes(self._dealer.recv(KEY_BYTES))
            server = Server(self._protocol, self._tensors, key)
            for value in server.masked_weights().values():
                self._link.send(value.contiguous().numpy().data.cast("B"))
            return server
        params, given = self._protocol.program.params, {}
        for name in (*self._protocol.known_params(), *self._protocol.masked_params()):
            shape = params[name].shape
            words = self._link.recv(8 * torch.Size(shape).numel())
            given[name] = torch.frombuffer(words, dtype=torch.int64).reshape(shape)
        return Client(self._protocol, given)

    def _infer(self, party: Party, number: int) -> dict[str, Any]:
        """Number 0 runs on zeros."""
        self._signals.progress("waiting for the dealer")
        ticket = self._ticket()
        self._barrier()
        self._signals.progress("preparing")
        start, sent = time.perf_counter(), self._link.sent
        inference = party.prepare(ticket, self._link)
        inference.on_action = self._tell
        early = self._link.sent - sent
        self._barrier()
        prepared = time.perf_counter()
        logits = inference.run(self._input(number))
        online = time.perf_counter() - prepared
        self._signals.finished(self._protocol.settings.batch if number else 0)
        spent = by_step(self._protocol, inference)
        return {"preparing": prepared - start, "online": online, "early": early, "spent": spent, "logits": logits}

    def _tell(self, action: Action) -> None:
        self._signals.progress(self._protocol.program.steps[action.step].name)

    def _input(self, number: int) -> Tensor | None:
        if self._images is None:
            return None
        return self._images[number - 1] if number else torch.zeros_like(self._images[0])

    def _ticket(self) -> Ticket:
        self._dealer.send(b"t")
        (length,) = struct.unpack(">Q", self._dealer.recv(8))
        return Ticket.from_bytes(bytearray(self._dealer.recv(length)), "the dealer's ticket")

    def _barrier(self) -> None:
        """Both parties are here."""
        self._link.send(b"b")
        self._link.recv(1)


def by_step(protocol: Protocol, inference: Inference) -> list[list[float]]:
    """[rounds, bytes sent, seconds, of them waiting] of every step, of opening the result as the last."""
    rows: list[list[float]] = [[0, 0, 0.0, 0.0] for _ in (*protocol.program.steps, None)]
    for action, spent in zip(protocol.actions, inference.spent, strict=True):
        row = rows[-1 if isinstance(action, Reveal) else action.step]
        for column, value in enumerate((spent.rounds, spent.sent, spent.seconds, spent.waited)):
            row[column] += value
    return rows
