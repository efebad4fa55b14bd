"""A party of the engine in a process of its own: `engine_party.py RANK ADDRESS PORT FOLDER [KEYS]`.

Reads a ticket's number a line from standard input, runs that inference, answers with a line of JSON. FOLDER holds what
this party may know (setup.pt) and its tickets as they are dealt; nothing of the dealer is imported here. With KEYS, its
folder of `deepshare secure keys`, the link is under TLS.
"""

import ctypes
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

from deepshare.secure.engine.party import Client, Party, Server  # noqa: E402
from deepshare.secure.engine.protocol import Protocol, Reveal  # noqa: E402
from deepshare.secure.engine.ticket import read_ticket, ticket_path  # noqa: E402
from deepshare.secure.net.channel import Channel  # noqa: E402
from secure import party_link  # noqa: E402

_PR_SET_PDEATHSIG = 1


def infer(party: Party, link: Channel, folder: Path, number: int, images: torch.Tensor | None) -> Any:
    """One inference: times in seconds, bytes sent, what each step cost, the logits at the client."""
    path = ticket_path(folder, number)
    ticket = read_ticket(path)
    party_link.barrier(link)
    start = time.perf_counter()
    early = -link.sent
    inference = party.prepare(ticket, link)
    early += link.sent
    party_link.barrier(link)
    preparing = time.perf_counter() - start
    sent = -link.sent
    start = time.perf_counter()
    logits = inference.run(images)
    online = time.perf_counter() - start
    answer = {"online": online, "preparing": preparing, "sent": sent + link.sent, "early": early}
    answer["steps"] = _by_step(party.protocol, inference.spent)
    answer["logits"] = None if logits is None else logits.tolist()
    path.unlink()
    return answer


def _by_step(protocol: Protocol, spent: Any) -> list[list[float]]:
    """[rounds, bytes sent, seconds, of them waiting] of every step, and of opening the logits."""
    rows = [[0, 0, 0.0, 0.0] for _ in (*protocol.program.steps, None)]
    for action, cost in zip(protocol.actions, spent, strict=True):
        row = rows[-1 if isinstance(action, Reveal) else action.step]
        for place, value in enumerate((cost.rounds, cost.sent, cost.seconds, cost.waited)):
            row[place] += value
    return rows


def die_with_parent() -> None:
    """A killed benchmark leaves no party behind that waits for the other (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    rank, address, port, folder = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    setup = torch.load(folder / "setup.pt", weights_only=True)
    protocol = Protocol.from_json(setup["protocol"])
    server = rank == 0
    party = Server(protocol, setup["tensors"], setup["mask_key"]) if server else Client(protocol, setup["given"])
    keys = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    link = party_link.listen(address, port, keys) if server else party_link.connect(address, port, keys)
    with torch.inference_mode():
        for line in sys.stdin:
            number = int(line)
            images = setup["images"][number : number + 1] if rank else None
            print(json.dumps(infer(party, link, folder, number, images)), flush=True)


if __name__ == "__main__":
    main()
