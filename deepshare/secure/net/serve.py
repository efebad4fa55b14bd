"""The server's process: holds the model, serves one query at a time, learns nothing of the images."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch

from deepshare.secure.engine.party import Server
from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.channel import TICK_SECONDS
from deepshare.secure.net.connect import Address
from deepshare.secure.net.keys import Identity
from deepshare.secure.net.session import Listener, Log, Session, last_words
from deepshare.secure.net.supply import Supply, agree_at_server
from deepshare.secure.net.waiting import Waiting

# A client that lives but asks for nothing may not keep the others waiting.
IDLE_SECONDS = 30.0


@dataclass(frozen=True)
class Pixels:
    """How the network wants its images: public, the client is told.

    Attributes:
        size: (C, H, W).
        mean, std: per channel, of pixels in [0, 1].
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Service:
    """One network at one address.

    Args:
        server: the model's party.
        supply: of its tickets.
        queue: how many queries may wait.
        ready: called with the address, once connections are taken.

    Attributes:
        address: where it listens.
        failures: what ended the queries that were not served whole.
    """

    def __init__(
        self,
        server: Server,
        supply: Supply,
        pixels: Pixels,
        *,
        listen: Address,
        identity: Identity,
        queue: int,
        log: Log,
        ready: Callable[[Address], None] = lambda address: None,
    ) -> None:
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._server, self._supply, self._pixels, self._log = server, supply, pixels, log
        self._program = server.protocol.to_json().encode()
        self._weights = safetensors.torch.save(server.masked_weights())
        self._weights_sha256 = hashlib.sha256(self._weights).hexdigest()
        self._waiting = Waiting(queue, log)
        self._listener = Listener(
            listen, identity, ("client",), admit=self._waiting.admit, on_session=self._waiting.add, log=log
        )
        self.address = self._listener.address
        ready(self.address)

    def run(self, queries: int | None) -> None:
        """Serves until `queries` have been served or failed; None: for ever.

        Raises:
            SecureError: the dealer is gone. Those who wait are told.
        """
        served = 0
        why = "it has served what it was to serve"
        try:
            while not self._stopping.is_set() and (queries is None or served < queries):
                self._supply.check()
                session = self._waiting.next(TICK_SECONDS)
                if session is not None:
                    self._serve_guarded(session)
                    served += 1
        except SecureError as error:
            why = last_words(error)
            raise
        except BaseException:
            why = "it was stopped"
            raise
        finally:
            self._listener.close()
            self._waiting.close(why)
            self._supply.close(why)

    def waiting(self) -> int:
        """How many queries wait."""
        return len(self._waiting)

    def stop(self) -> None:
        """Lets `run` return after the query that is being served."""
        self._stopping.set()

    def _serve_guarded(self, session: Session) -> None:
        """A query that fails ends alone: its client is told why."""
        why = "it failed"  # by a bug, whose traceback ends this process
        try:
            inferences = self._serve(session)
            why = ""
            self._log(f"done: {session.party.name}, {inferences} inferences")
        except SecureError as error:
            why = last_words(error)
            self.failures.append(str(error))
            self._log(f"failed: query of {session.party.name}: {str(error).removeprefix('secure: ')}")
        finally:
            session.close(why)
            self._waiting.done()

    def _serve(self, session: Session) -> int:
        """One client's inferences, as many as it asks for."""
        self._log(f"serving: {session.party.name}")
        self._introduce(session)
        count = 0
        while self._asked(session):
            self._infer(session)
            count += 1
        return count

    def _introduce(self, session: Session) -> None:
        """What the client must know: protocol, images, masked weights unless it has them."""
        channel, pixels = session.channel, self._pixels
        messages.send(
            channel,
            "welcome",
            size=pixels.size,
            mean=pixels.mean,
            std=pixels.std,
            version=self._supply.version,
            live=self._supply.live,
            weights=self._weights_sha256,
        )
        messages.send_bytes(channel, "program", self._program)
        _, content = messages.receive(channel, "weights")
        if not content.get("have"):
            messages.send_bytes(channel, "weights", self._weights)

    def _asked(self, session: Session) -> bool:
        with session.within(IDLE_SECONDS):
            return messages.receive(session.channel, "infer", "end")[0] == "infer"

    def _infer(self, session: Session) -> None:
        """One inference: agree on a ticket, burn it, prepare, run. An early end leaves nothing of it behind."""
        channel = session.channel
        self._supply.begin(session.party)
        number = agree_at_server(channel, self._supply)
        ticket = self._supply.take(number)
        self._log(f"ticket {number}: {session.party.name}")
        self._server.prepare(ticket, channel).run()
