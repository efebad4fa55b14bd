"""A party of our own private ReLU over plain TCP, from shares to shares: the opening of the result is not measured."""

import time
from typing import Any

import relu_party
import torch
from engine_network import protocol
from secure import party_link
from torch import Tensor

from deepshare.secure.engine.party import Client, Party, Server
from deepshare.secure.engine.protocol import Action, Reveal
from deepshare.secure.engine.ticket import read_ticket, ticket_path
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.net.channel import Channel

ADDRESS = "127.0.0.1"


class Run:
    """One inference on a ticket of its own; `seconds` and `loopback_bytes` end where the opening begins.

    Then this party has all that the other sent for the ReLU, and has sent all of its own.
    """

    def __init__(self, party: Party, link: Channel, options: Any, number: int) -> None:
        ticket = read_ticket(ticket_path(options.folder / f"party{options.rank}", number))
        self._inference = party.prepare(ticket, link)
        self._inference.on_action = self._mark
        self._link = link
        self._start = (0.0, 0, 0)
        self.seconds, self.loopback_bytes, self.sent = 0.0, 0, 0

    def __call__(self, images: Tensor | None) -> Tensor | None:
        party_link.barrier(self._link)
        before = relu_party.loopback_bytes()
        party_link.barrier(self._link)
        self._start = (time.perf_counter(), before, self._link.sent)
        return self._inference.run(images)

    def _mark(self, action: Action) -> None:
        if isinstance(action, Reveal):
            start, moved, sent = self._start
            self.seconds = time.perf_counter() - start
            self.loopback_bytes = relu_party.loopback_bytes() - moved
            self.sent = self._link.sent - sent
            self.rounds = sum(spent.rounds for spent in self._inference.spent)


def main() -> None:
    options = relu_party.arguments()
    torch.set_num_threads(1)
    made = protocol(options.elements, options.setting)
    party = Server(made, {}, None) if options.rank == 0 else Client(made, {})
    link = (party_link.connect if options.rank else party_link.listen)(ADDRESS, options.port)
    x = torch.from_numpy(relu_party.inputs(options.elements)).reshape(1, 1, 1, -1)
    images = encode(x) if options.rank else None
    with torch.inference_mode():
        runs = [(run := Run(party, link, options, number), run(images)) for number in range(options.repeats + 1)]
    timed = [run for run, _ in runs[1:]]
    measured = {"seconds": [run.seconds for run in timed], "loopback_bytes": [run.loopback_bytes for run in timed]}
    measured |= {"warm": True, "rounds": timed[0].rounds, "counted_bytes": 2 * timed[0].sent}
    result = runs[-1][1]
    revealed = None if result is None else decode(result).numpy()
    relu_party.finish(options, measured, revealed, ("torch",))


if __name__ == "__main__":
    main()
