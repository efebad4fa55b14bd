"""T3 and key replacement: which random streams the engine draws, and what hangs on which key."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

from cryptography.hazmat.primitives import ciphers
from engine_cases import Setup, infer
from torch import Tensor, cat, equal, int64
from transcripts import CLIENT, SERVER, Recorded, roles

from deepshare.secure.dealer import deal
from deepshare.secure.dealer.deal import Deal
from deepshare.secure.engine.party import Client, Server
from deepshare.secure.engine.protocol import Give, Open, Protocol
from deepshare.secure.engine.ticket import Ticket

Pair = tuple[Tensor, Tensor]  # before and after a key was replaced


@dataclass(frozen=True)
class Block:
    """Counter blocks [first, end) under a key."""

    key: bytes
    first: int
    end: int


@contextmanager
def labels() -> Iterator[list[Block]]:
    """Every use of AES in counter mode within, as it reaches the cipher, whatever the engine calls it."""
    seen: list[Block] = []
    real = ciphers.Cipher

    def recording(algorithm, mode):
        cipher = real(algorithm, mode)
        if not isinstance(mode, ciphers.modes.CTR):
            return cipher

        def update_into(data, out):
            first = int.from_bytes(mode.nonce, "big")
            seen.append(Block(bytes(algorithm.key), first, first + (len(data) + 15) // 16))
            return encryptor.update_into(data, out)

        encryptor = cipher.encryptor()
        return SimpleNamespace(encryptor=lambda: SimpleNamespace(update_into=update_into))

    with patch.object(ciphers, "Cipher", recording):
        yield seen


def no_label_is_drawn_twice(recorded: Recorded) -> None:
    """T3: counter blocks never meet, at the dealer or at the parties, over two inferences and the weights' masks.

    The server draws its halves of masks and its bits; the client draws on every wire but the comparison keys, and it
    alone on those of the one-way halves.
    """
    protocol, tensors = recorded.protocol, recorded.parties.tensors
    with labels() as at_dealer:
        dealt = Deal(protocol)
        tickets = [dealt.tickets(number) for number in (0, 1)]
    with labels() as at_parties:
        server = Server(protocol, tensors, dealt.server_key)
        parties = Setup(protocol, tensors, dealt, server, Client(protocol, server.masked_weights()))
        for pair in tickets:
            infer(parties, pair, recorded.images)
    for where, seen in (("the dealer", at_dealer), ("the parties", at_parties)):
        _assert_apart(where, seen)
    assert set(at_parties) == set(at_dealer), "the parties draw what the dealer does not"
    for pair in tickets:
        for party, kinds in ((SERVER, ("mask", "bits")), (CLIENT, ("mask", "own", "bits", "product", "xor"))):
            drawn = {block.first >> 64 for block in at_parties if block.key == pair[party].key}
            assert drawn == {wire.number for wire in protocol.wires if wire.kind in kinds and wire.bytes}
    assert len({ticket.public_key for pair in tickets for ticket in pair}) == len(tickets), "public AES keys are equal"


def _assert_apart(where: str, seen: list[Block]) -> None:
    ordered = sorted(seen, key=lambda block: (block.key, block.first))
    assert ordered, "nothing was drawn"
    for before, after in pairwise(ordered):
        if before.key == after.key:
            assert before.end <= after.first, f"{where}: a label is drawn twice"


def keys_are_replaced(recorded: Recorded) -> None:
    """One key changed at a time: what depends on the other alone stays, byte for byte, and the rest changes."""
    keys = [bytes([value]) * 16 for value in range(1, 6)]
    pairs = [(keys[0], keys[1]), (keys[2], keys[1]), (keys[0], keys[3])]
    tickets = tuple(_dealt_with(recorded, *pair, keys[4]) for pair in pairs)
    rans = tuple(infer(recorded.parties, pair, recorded.images) for pair in tickets)
    replaced = Recorded(recorded.model, recorded.parties, recorded.images, tickets, rans)
    _another_server_key(replaced)
    _another_client_key(replaced)
    for wire in recorded.protocol.wires:
        if wire.kind == "mask":
            for party in (SERVER, CLIENT):
                share = replaced.drawn(0, party, wire)
                assert not bool((share == 0).any()), f"wire {wire.number}: a mask is one party's share"


def _dealt_with(recorded: Recorded, first: bytes, second: bytes, public: bytes) -> tuple[Ticket, Ticket]:
    """Tickets from these keys, the noise on the logits zero."""
    given = iter([first, second, public])
    scripted = SimpleNamespace(token_bytes=lambda count: next(given, bytes(count)))
    with patch.object(deal, "secrets", scripted):
        return recorded.parties.deal.tickets(0)


def _another_server_key(replaced: Recorded) -> None:
    """k0 changed: the client's shares and messages stay until a gate has gone in; all that holds a or r changes."""
    protocol, gated = replaced.protocol, _depends_on_a_gate(replaced.protocol)
    before, after = (replaced.rans[index].client for index in (0, 1))
    pairs: dict[str, list[Pair]] = defaultdict(list)
    assert before.prepared.sent == after.prepared.sent
    for step in protocol.early_values:
        assert equal(before.values[step], after.values[step]), "the client's share before the input changed"
    for old, new in zip(replaced.messages[0], replaced.messages[1], strict=True):
        action = protocol.actions[old.action]
        if old.sender == CLIENT and isinstance(action, Open | Give) and action.operand.value not in gated:
            assert equal(old.data, new.data), f"{old.label} changed with the server's key"
        elif old.kind != "logits":
            pairs[old.label].append((old.data, new.data))
    for label, of_label in pairs.items():
        changed = _changed(of_label)
        assert changed > (0.9 if "half" in label else 0.4), f"{label}: {changed:.0%} changed"
    for role, of_role in _dealt(replaced, 1).items():
        changed = _changed(of_role)
        assert changed == 0 if role in ("c", "rho") else changed > 0.25, f"{role}: {changed:.0%} changed"


def _another_client_key(replaced: Recorded) -> None:
    """k1 changed: every correction and every message of the client changes."""
    pairs = _dealt(replaced, 2)
    for old, new in zip(replaced.messages[0], replaced.messages[2], strict=True):
        if old.sender == CLIENT:
            pairs[old.label].append((old.data, new.data))
    for name, of_name in pairs.items():
        changed = _changed(of_name)
        assert changed == 1 if of_name[0][0].dtype == int64 else changed > 0.9, f"{name}: {changed:.0%} changed"


def _dealt(replaced: Recorded, index: int) -> dict[str, list[Pair]]:
    """By role, what the server is dealt with the first keys and with others."""
    found: dict[str, list[Pair]] = defaultdict(list)
    names = roles(replaced.protocol)
    for wire in replaced.protocol.wires:
        if wire.dealt_to(SERVER):
            pair = (replaced.dealt(0, SERVER, wire), replaced.dealt(index, SERVER, wire))
            found[names[wire.number]].append(pair)
    return found


def _depends_on_a_gate(protocol: Protocol) -> set[int]:
    """Values whose share at the client holds an opened gate; a linear layer with secret weights makes a fresh one."""
    found: set[int] = set()
    for index, step in enumerate(protocol.program.steps):
        if index in protocol.early_values:
            continue
        if step.op in ("relu", "shared", "mask", "select") or found.intersection(step.inputs):
            found.add(index)
    return found


def _changed(pairs: list[Pair]) -> float:
    """Share of the words or bytes that differ."""
    return float(cat([(before != after).flatten() for before, after in pairs]).double().mean())
