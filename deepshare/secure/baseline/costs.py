"""Rounds and bytes of every operation, as formulas: exact integers, equal to CrypTen's counters.

Two parties, 64-bit ring, CrypTen 0.4.1's protocols. One opening of n words is one round in which each party sends 8n
bytes.

    product (Beaver)     1 round, both operands opened       8 (n_x + n_y)   each way
    AND                  1 round                             16 n
    A2B                  7 rounds: one AND, six of a set-propagate-kill tree on two words: 16 n + 6 * 32 n = 208 n
    B2A of one bit       1 round                             8 n
    DReLU = A2B + B2A    8 rounds                            216 n
    ReLU = DReLU, product                     9 rounds       232 n

Sharing an input or a weight moves no byte: CrypTen draws the other party's share from a seed both hold. Neither does
dealing under TFP. Under TTP the dealer sends party 0 a word of every product, AND and bit: 13 + 1 words, 112 bytes, a
DReLU. With them CrypTen's counter shows 544 n at party 0, where it shows 432 n at party 1.
"""

from dataclasses import dataclass
from math import prod

from deepshare.secure.program import LOCAL_OPS, Program, Step

WORD = 8  # bytes of a ring element
A2B_BYTES = 16 + 6 * 32
DEALT_A2B_BYTES = WORD + 6 * 2 * WORD
DRELU_BYTES = A2B_BYTES + WORD
DRELU_ROUNDS = 8


@dataclass(frozen=True)
class Cost:
    """Rounds, and bytes each way: what party 0 (server) and party 1 (client) send."""

    rounds: int = 0
    server_sends: int = 0
    client_sends: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.rounds + other.rounds,
            self.server_sends + other.server_sends,
            self.client_sends + other.client_sends,
        )

    @property
    def comm_bytes(self) -> int:
        """What either party's CrypTen counter shows: sent plus received."""
        return self.server_sends + self.client_sends


def exchange(rounds: int, sent: int) -> Cost:
    """Rounds in which each party sends `sent` bytes in total."""
    return Cost(rounds, sent, sent)


def product(n_x: int, n_y: int) -> Cost:
    """Beaver product, convolution or matrix product of operands with n_x and n_y elements."""
    return exchange(1, WORD * (n_x + n_y))


def drelu(n: int) -> Cost:
    """Comparison of n elements with zero, as an arithmetic share of the bit."""
    return exchange(DRELU_ROUNDS, DRELU_BYTES * n) if n else Cost()


def relu(n: int) -> Cost:
    """DReLU times x: 9 rounds, 232 bytes an element."""
    return drelu(n) + product(n, n) if n else Cost()


def shared(n: int, channels: int, gates: int, *, secret: bool) -> Cost:
    """SharedReLU2d on n elements of `channels` channels, comparing `gates` elements (0 for a follower).

    Public alpha, beta: DReLU on the prototypes, one product: 9 rounds, 16 n + 216 gates; a follower 1 round, 16 n.
    Secret: one product more, alpha * gate: 10 rounds, 24 n + 216 gates + 8 C; a follower 2 rounds. The 8 C is the
    opening of alpha against its mask, C words an inference.
    """
    cost = drelu(gates) + product(n, n)
    return cost + product(n, channels) if secret else cost


def open_to_client(n: int) -> Cost:
    """The server sends its share of n elements to the client."""
    return Cost(1, WORD * n, 0)


def step_cost(program: Program, step: Step, batch: int, *, secret: bool) -> Cost:
    """Cost of one step for `batch` images; `secret` says whether the weights are shared between the parties."""
    n = batch * step.elements
    if step.op in ("conv2d", "linear", "affine"):
        weight = prod(program.params[step.params["scale" if step.op == "affine" else "weight"]].shape)
        return product(batch * program.steps[step.inputs[0]].elements, weight) if secret else Cost()
    if step.op in ("relu", "mask"):
        return relu(batch * program.drelus(step))
    if step.op == "shared":
        return shared(n, step.shape[0], batch * program.drelus(step), secret=secret)
    if step.op in ("input", *LOCAL_OPS):
        return Cost()
    raise AssertionError(f"unknown step {step.op}")


def corrections(program: Program, step: Step, batch: int, *, secret: bool) -> int:
    """Bytes that TTP's dealer sends party 0 for one step; with TFP there are none."""
    n = WORD * batch * step.elements
    compared = batch * program.drelus(step)
    if step.op in ("conv2d", "linear", "affine"):
        return n if secret else 0
    if step.op in ("relu", "mask"):
        return (DEALT_A2B_BYTES + WORD + WORD) * compared
    if step.op == "shared":
        return (DEALT_A2B_BYTES + WORD) * compared + (2 * n if secret else n)
    return 0


def dealt(program: Program, batch: int, *, secret: bool) -> int:
    """`corrections` of a whole inference."""
    return sum(corrections(program, step, batch, secret=secret) for step in program.steps)


def predict(program: Program, batch: int, *, secret: bool) -> list[Cost]:
    """Cost of every step, and of opening the result to the client as the last entry; their sum is one batch."""
    costs = [step_cost(program, step, batch, secret=secret) for step in program.steps]
    return [*costs, open_to_client(batch * program.steps[-1].elements)]


def total(costs: list[Cost]) -> Cost:
    return sum(costs, Cost())
