"""Dealer, server and clients of one small network in one process, on loopback with mutual TLS."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from net_cases import HERE, identity, keys
from secure_cases import cases
from torch import Tensor

from deepshare.secure.engine.party import Client, Server
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.lower import lower
from deepshare.secure.net.connect import Address
from deepshare.secure.net.deal import Dealer, deal_to_disk
from deepshare.secure.net.query import Answer, ask, client_supply, receive_weights, receive_welcome
from deepshare.secure.net.serve import Pixels, Service
from deepshare.secure.net.session import Session, last_words, open_session
from deepshare.secure.net.supply import server_supply

SIZE = (4, 3, 4)


@dataclass
class Flow:
    """A network with its keys; `log` has the lines of every process."""

    folder: Path
    keys: Path
    protocol: Protocol
    tensors: dict[str, Tensor]
    log: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, settings: Settings | None = None, case: str = "follower") -> "Flow":
        program, tensors = lower(cases()[case].model, SIZE)
        return cls(folder, keys(folder), Protocol.compile(program, settings or Settings(gate="tree")), tensors)

    def images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(-(1 << 17), 1 << 17, (count, *SIZE), generator=generator)

    def deal(self, count: int, name: str = "deal") -> Path:
        deal_to_disk(self.protocol, count, self.folder / name)
        return self.folder / name

    @contextmanager
    def dealer(self) -> Iterator[Dealer]:
        dealer = Dealer(Address(HERE, 0), identity(self.keys, "dealer"), ahead=1, log=self.log.append)
        try:
            yield dealer
        finally:
            dealer.close("the test ended")

    def service(self, *, dealer: Address | None = None, material: Path | None = None, queue: int = 8) -> Service:
        own = identity(self.keys, "server")
        supply, key = server_supply(own, self.protocol, self.tensors, dealer, material)
        return Service(
            Server(self.protocol, self.tensors, key),
            supply,
            Pixels(SIZE, (0.0,) * 4, (1.0,) * 4),
            listen=Address(HERE, 0),
            identity=own,
            queue=queue,
            log=self.log.append,
        )

    @contextmanager
    def running(self, service: Service, queries: int | None = None) -> Iterator[list[BaseException]]:
        """Serves in a thread meanwhile; what ended it, if it was not the number of queries."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                service.run(queries)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield errors
        finally:
            if queries is None:
                service.stop()
            thread.join(30)
            assert not thread.is_alive(), "the server hangs"

    def session(self, service: Service, name: str = "client-1", **more) -> Session:
        return open_session(service.address, identity(self.keys, name), "server", **more)

    def query(
        self,
        service: Service,
        images: Tensor,
        *,
        name: str = "client-1",
        dealer: Address | None = None,
        material: Path | None = None,
    ) -> Answer:
        session = self.session(service, name)
        why = "the client ended"
        try:
            welcome = receive_welcome(session)
            supply = client_supply(identity(self.keys, name), welcome, dealer, material)
            try:
                client = Client(welcome.protocol, receive_weights(session, welcome, self.folder / "cache"))
                answer = ask(session, supply, client, images, self.log.append)
            finally:
                supply.close()
            why = ""
            return answer
        except Exception as error:
            why = last_words(error)
            raise
        finally:
            session.close(why)
