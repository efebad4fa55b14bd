"""Two parties of the engine in two threads of this process, for tests."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine.inference import Inference
from deepshare.secure.engine.link import MemoryLink
from deepshare.secure.engine.party import Client, Party, Server
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.fixed_point import encode
from deepshare.secure.lower import lower

EVERY_SETTING = [
    Settings(),
    Settings(gate="tree"),
    Settings(affine="public"),
    Settings("public"),
    Settings("public", gate="tree"),
    Settings("public", gate="tree", gate_bits=32),
    Settings(gate_bits=32),
]


@dataclass(frozen=True)
class Setup:
    """A network with everything its parties need."""

    protocol: Protocol
    tensors: dict[str, Tensor]
    deal: Deal
    server: Server
    client: Client


@dataclass(frozen=True)
class Ran:
    """One inference: what each party kept, the client's logits, the bytes on the wire."""

    server: Inference
    client: Inference
    logits: Tensor
    links: "tuple[RecordingLink, RecordingLink]"


class RecordingLink(MemoryLink):
    """Keeps what was sent, and the length of the chain of messages that a receipt ends."""

    def __init__(self, *queues) -> None:
        super().__init__(*queues)
        self.messages: list[bytes] = []
        self.clock = 0
        self.stamps: list[tuple[int, int]] = []  # (bytes sent so far, clock when they were)
        self.other: RecordingLink | None = None

    def start_clock(self) -> None:
        """What was sent before is no part of any chain."""
        self.clock = 0
        self.stamps = [(self.sent, 0)]

    def send(self, data) -> None:
        self.messages.append(bytes(data))
        self.stamps.append((self.sent + len(data), self.clock + 1))  # first: the other thread may be waiting
        super().send(data)

    def recv(self, n: int) -> memoryview:
        received = super().recv(n)
        assert self.other is not None
        stamp = next(stamp for sent, stamp in list(self.other.stamps) if sent >= self.received)
        self.clock = max(self.clock, stamp)
        return received


def setup(model: nn.Module, images: Tensor, settings: Settings) -> Setup:
    """Settings' batch becomes the number of images."""
    program, tensors = lower(model, (images.shape[1], images.shape[2], images.shape[3]))
    changed = {**settings.__dict__, "batch": len(images)}
    protocol = Protocol.compile(program, Settings(**changed))
    deal = Deal(protocol)
    server = Server(protocol, tensors, deal.server_key)
    return Setup(protocol, tensors, deal, server, Client(protocol, server.masked_weights()))


def linked() -> tuple[RecordingLink, RecordingLink]:
    first, second = RecordingLink.pair()
    first.other, second.other = second, first  # type: ignore[attr-defined]
    return first, second  # type: ignore[return-value]


def infer(parties: Setup, tickets: tuple[Ticket, Ticket], images: Tensor) -> Ran:
    """Runs one inference on float images with these tickets."""
    links = linked()
    ran: dict[int, Inference] = {}
    failed: list[BaseException] = []
    both_ready = threading.Barrier(2, timeout=60)

    def run(party: Party, images: Tensor | None) -> Tensor | None:
        torch.set_num_threads(1)  # a setting of the thread
        try:
            ran[party.rank] = party.prepare(tickets[party.rank], links[party.rank])
            both_ready.wait()
            links[party.rank].start_clock()
            both_ready.wait()
            return ran[party.rank].run(images)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                failed.append(error)
            both_ready.abort()
            return None

    thread = threading.Thread(target=run, args=(parties.server, None))
    thread.start()
    logits = run(parties.client, encode(images))
    thread.join()
    if failed:
        raise failed[0]
    assert logits is not None
    return Ran(ran[0], ran[1], logits, links)
