"""The dealer's part of our own private ReLU: tickets, in a folder for each party."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from engine_network import protocol

from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine.ticket import write_ticket

MOST_BYTES = 4e9  # of all tickets together, on disk


class TooLargeError(RuntimeError):
    """The tickets would not fit; the message says how large they are."""


def deal(folder: Path, elements: int, setting: str, count: int) -> dict[str, Any]:
    """Writes `count` pairs of tickets to FOLDER/party0 and party1; returns the bytes and seconds of a pair.

    Raises:
        TooLargeError: they would have more than MOST_BYTES.
    """
    made = protocol(elements, setting)
    size = sum(made.body_bytes(party) for party in (0, 1))
    if count * size > MOST_BYTES:
        raise TooLargeError(f"{size / 1e9:.1f} GB of material a run")
    dealer, seconds = Deal(made), []
    for number in range(count):
        start = time.perf_counter()
        tickets = dealer.tickets(number)
        seconds.append(time.perf_counter() - start)
        for ticket in tickets:
            own = folder / f"party{ticket.party}"
            own.mkdir(exist_ok=True)
            write_ticket(own, ticket)
    return {"dealt_bytes": size, "dealing_seconds": median(seconds)}
