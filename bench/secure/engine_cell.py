"""One visit of a cell on the engine: a process for each party, TCP or TLS between them, the dealer in this process.

Tickets are dealt before each inference and handed over as files; what they take on a link is in `total` (table6.py).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine import costs
from deepshare.secure.engine.party import mask_weights
from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.engine.ticket import Ticket, write_ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.lower import lower
from deepshare.secure.net.keys import make_keys
from secure.cells import NotHereError, Visit
from secure.chain import path_bytes
from secure.links import End, Link
from secure.networks import Network

ROLES = ("server", "client")
PORT = 27300
DEALER = "ours: a process apart from the parties, tickets handed over as files"
MOST_TICKET = 600e6  # bytes: DCF keys of an all-ReLU WRN-22-8 or Tiny-ImageNet network are 1.2 to 1.8 GB a party


class Pair:
    """The two parties' processes."""

    def __init__(self, ends: tuple[End, End], folders: tuple[Path, Path], keys: list[Path], stack: ExitStack) -> None:
        self._folders = folders
        script = Path(__file__).with_name("engine_party.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._processes = []
        for rank, (end, folder) in enumerate(zip(ends, folders, strict=True)):
            with (folder / "errors").open("wb") as errors:
                party = [str(rank), ends[0].address, str(PORT), str(folder), *map(str, keys[rank : rank + 1])]
                command = [*end.command, sys.executable, "-P", str(script), *party]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
            stack.callback(_end, process)
            self._processes.append(process)

    def infer(self, tickets: tuple[Ticket, Ticket]) -> tuple[Any, Any]:
        """(the server's, the client's) answer to one inference."""
        for ticket, folder, process in zip(tickets, self._folders, self._processes, strict=True):
            write_ticket(folder, ticket)
            assert process.stdin is not None
            process.stdin.write(f"{ticket.number}\n")
            process.stdin.flush()
        server, client = (self._answer(rank) for rank in (0, 1))
        return server, client

    def _answer(self, rank: int) -> Any:
        output = self._processes[rank].stdout
        line = output.readline() if output is not None else ""
        if not line:
            words = (self._folders[rank] / "errors").read_text(errors="replace").strip().splitlines()
            raise SecureError(
                f"secure_table6: the {ROLES[rank]} ended without an answer: {words[-1] if words else '-'}"
            )
        return json.loads(line)


def visit(gate: str, network: Network, weights: str, link: Link, images: int) -> Visit:
    """As crypten_cell.visit.

    Also: steps, step_costs, step_offline: names, then per step and party rounds, bytes, seconds and waiting, of the
    inference with the median time.

    Raises:
        NotHereError: a ticket would have more than MOST_TICKET bytes.
    """
    model, drelus, plan = network.build()
    batch = network.images(images)
    program, tensors = lower(model, (3, network.family.side, network.family.side))
    protocol = Protocol.compile(program, Settings(weights=weights, gate=gate))  # type: ignore[arg-type]
    sizes = [protocol.body_bytes(party) for party in (0, 1)]
    if max(sizes) > MOST_TICKET:
        raise NotHereError(f"{max(sizes) / 1e6:,.0f} MB of material a party")
    deal = Deal(protocol)
    masked = mask_weights(protocol, tensors, deal.server_key)
    given = {key: tensors[key] for key in protocol.known_params()} | masked
    setups: list[dict[str, Any]] = [
        {"tensors": tensors, "mask_key": deal.server_key if masked else None},
        {"given": given, "images": encode(torch.cat([batch[:1], batch]))},
    ]
    answers, dealing = _run(protocol, deal, setups, link, images + 1)
    predicted = costs.total(protocol)
    timed = answers[1:]
    online = [client["online"] for _, client in timed]
    middle = timed[online.index(sorted(online)[len(online) // 2])]
    server, client = middle
    if (server["sent"], client["sent"], client["early"]) != (
        predicted.server_sends,
        predicted.client_sends,
        predicted.client_sends_early,
    ):
        raise SecureError(f"secure_table6: {network.name}: the parties sent other bytes than predicted ({predicted})")
    with torch.no_grad():
        expected = model(batch).double()
    logits = decode(torch.tensor([client["logits"][0] for _, client in timed], dtype=torch.int64))
    return {
        "online": online,
        "preparing": median(max(one["preparing"] for one in pair) for pair in timed),
        "dealing": median(dealing[1:]),
        "rounds": predicted.rounds,
        "flights": costs.flights(protocol),
        "path_bytes": path_bytes(protocol),
        "server_bytes": server["sent"],
        "client_bytes": client["sent"],
        "early_bytes": client["early"],
        "offline_bytes": sizes,
        "setup_bytes": sum(8 * value.numel() for value in given.values()),
        "drelus": drelus,
        "plan": plan,
        "provider": DEALER,
        "device": "CPU, one core a party",
        "batch": 1,
        "worst_error": float((logits - expected).abs().max()),
        "logit_range": float(expected.abs().max()),
        "steps": [[step.name, step.op] for step in program.steps] + [["logits to the client", "opening"]],
        "step_costs": {"server": server["steps"], "client": client["steps"]},
        "step_offline": [
            one.dealt_server + one.dealt_client + one.client_sends_early for one in costs.by_step(protocol)
        ],
    }


def _run(
    protocol: Protocol, deal: Deal, setups: list[dict[str, Any]], link: Link, count: int
) -> tuple[list[tuple[Any, Any]], list[float]]:
    """(answers of each inference, seconds of dealing for each); the first warms up."""
    root = Path(tempfile.mkdtemp(prefix="deepshare-table6-"))
    try:
        folders = (root / "server", root / "client")
        for folder, setup in zip(folders, setups, strict=True):
            folder.mkdir(mode=0o700)
            torch.save({"protocol": protocol.to_json(), **setup}, folder / "setup.pt")
        answers, dealing = [], []
        keys = make_keys(root / "keys") if link.tls else []  # the server's, the dealer's, the client's
        with link.ends() as ends, ExitStack() as stack:
            pair = Pair(ends, folders, keys[::2], stack)
            for number in range(count):
                start = time.perf_counter()
                tickets = deal.tickets(number)
                dealing.append(time.perf_counter() - start)
                answers.append(pair.infer(tickets))
        return answers, dealing
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
