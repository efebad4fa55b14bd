"""What one inference costs, action by action, as formulas: exact integers (docs/engine.md).

n elements, g gates, m bits a comparison, G = ceil(g / 8) bytes of packed bits, b = m / 4 blocks of the carry tree:

    opening               1 round                 8 n each way; the client's half of an early value before the input
    secret linear layer   1 round, client only    8 n of its input, unless that is opened; dealt 8 n of its output
    comparison, tree      log2(b) + 1 rounds      G (sum of 3k - 1 over k = b/2, b/4, ..., 1; + 1) each way
                                                  dealt 2 b g + G (sum of 2k - 1) + 8 g to the server
    comparison, dcf       1 round                 G each way; dealt 16 (m - 7) g to each, 8 g to the server
    gated product         0 rounds                dealt 8 n to the server, 32 n with secret alpha and beta
    logits                1 round, server only    8 n; dealt 8 n where the last step is linear
"""

from dataclasses import dataclass
from math import prod

from deepshare.secure.engine.protocol import (
    BLOCK_BITS,
    Action,
    Compare,
    Gated,
    Give,
    Linear,
    Local,
    Open,
    Protocol,
    Reveal,
    packed_bytes,
)

WORD = 8


@dataclass(frozen=True)
class EngineCost:
    """Of one batch, in bytes of payload.

    Attributes:
        rounds: messages that stand one after another where each pair of halves counts once, as CrypTen counts.
        server_sends, client_sends: online, with the input known.
        client_sends_early: before the input is known.
        dealt_server, dealt_client: bodies of the tickets.
    """

    rounds: int = 0
    server_sends: int = 0
    client_sends: int = 0
    client_sends_early: int = 0
    dealt_server: int = 0
    dealt_client: int = 0

    def __add__(self, other: "EngineCost") -> "EngineCost":
        names = self.__dataclass_fields__
        return EngineCost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def one_way(self) -> int:
        """Bytes the busier party sends online."""
        return max(self.server_sends, self.client_sends)


def predict(protocol: Protocol) -> list[EngineCost]:
    """The cost of every action; their sum is one batch."""
    return [_cost(protocol, action) for action in protocol.actions]


def total(protocol: Protocol) -> EngineCost:
    return sum(predict(protocol), EngineCost())


def by_step(protocol: Protocol) -> list[EngineCost]:
    """The same per step of the program, and of opening the logits as the last entry."""
    found = [EngineCost() for _ in (*protocol.program.steps, None)]
    for action, cost in zip(protocol.actions, predict(protocol), strict=True):
        at = -1 if isinstance(action, Reveal) else action.step
        found[at] = found[at] + cost
    return found


def _cost(protocol: Protocol, action: Action) -> EngineCost:
    match action:
        case Open():
            n = WORD * prod(action.mask.shape)
            return EngineCost(1, n, 0, n) if action.early else EngineCost(1, n, n)
        case Give():
            n = WORD * prod(action.mask.shape)
            return EngineCost(client_sends_early=n) if action.early else EngineCost(1, client_sends=n)
        case Linear():
            return EngineCost(dealt_server=WORD * prod(protocol.shape(action.step)))
        case Compare():
            return _comparison(action.gates, protocol.settings.gate_bits, protocol.settings.gate)
        case Gated():
            secret = protocol.program.steps[action.step].op == "shared" and protocol.settings.secret_affine
            return EngineCost(dealt_server=(4 if secret else 1) * WORD * prod(action.opened.mask.shape))
        case Local():
            return EngineCost()
        case Reveal():
            n = WORD * prod(protocol.shape(action.step))
            return EngineCost(1, server_sends=n, dealt_server=n if action.noise is not None else 0)
    raise AssertionError(f"unknown action {action}")


def _comparison(gates: int, bits: int, gate: str) -> EngineCost:
    packed, flip = packed_bytes(gates), WORD * gates
    if gate == "dcf":
        keys = _whole_words(16 * (bits - 7) * gates)
        return EngineCost(1, packed, packed, 0, flip + keys, keys)
    blocks = bits // BLOCK_BITS
    levels = [blocks >> level for level in range(1, blocks.bit_length())]
    opened = packed * (sum(3 * nodes - 1 for nodes in levels) + 1)
    products = sum(_whole_words(packed * (2 * nodes - 1)) for nodes in levels)
    dealt = flip + _whole_words(2 * blocks * gates) + products
    return EngineCost(len(levels) + 1, opened, opened, 0, dealt, 0)


def _whole_words(count: int) -> int:
    """Everything dealt begins at a multiple of 8 bytes."""
    return count + -count % WORD


def flights(protocol: Protocol) -> int:
    """Messages on the longest chain from the client's input to its logits, each waiting for the one before.

    One flight takes half a round trip. Fewer than the rounds with secret weights: a party sends its half of an opening
    as soon as it knows it, so the client's leaves with its message to the linear layer before, and the server's gates
    leave with its half of the opening.
    """
    server = client = 0
    for action in protocol.actions:
        for _ in range(_exchanges(protocol, action)):
            server, client = max(server, client + 1), max(client, server + 1)
        if isinstance(action, Reveal) or (isinstance(action, Open) and action.early):
            client = max(client, server + 1)
        if isinstance(action, Give) and not action.early:
            server = max(server, client + 1)
    return client


def _exchanges(protocol: Protocol, action: Action) -> int:
    """Rounds in which both parties send."""
    if isinstance(action, Compare):
        return _cost(protocol, action).rounds
    return int(isinstance(action, Open) and not action.early)
