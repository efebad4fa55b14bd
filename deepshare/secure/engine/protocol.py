"""A Program with Settings as a schedule of actions with numbered wires (docs/engine.md).

Both parties and the dealer compile the same one; no weight is in it.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import torch

from deepshare.secure.engine import dcf
from deepshare.secure.engine.ring import LINEAR
from deepshare.secure.engine.streams import KEY_BYTES
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import SCALE_BITS
from deepshare.secure.program import Program, Step

PROTOCOL_VERSION = 1
SERVER, CLIENT = 0, 1  # the parties' ranks
BLOCK_BITS = 4  # of the carry tree's table look-up
Secrecy = Literal["secret", "public"]
Gate = Literal["tree", "dcf"]


@dataclass(frozen=True)
class Settings:
    """How a program is run.

    Attributes:
        weights: "secret": the server alone knows them; "public": both parties do.
        affine: the same for alpha and beta; None: as weights. Secret only with secret weights.
        gate: the comparison's backend: "tree" (more rounds, little material) or "dcf" (no rounds, large keys).
        gate_bits: 64, or 32: right only while every compared value is below 2^15 in magnitude.
        batch: images an inference.
    """

    weights: Secrecy = "secret"
    affine: Secrecy | None = None
    gate: Gate = "dcf"
    gate_bits: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        _check_one_of("weights", self.weights, get_args(Secrecy))
        _check_one_of("affine", self.affine, (None, *get_args(Secrecy)))
        _check_one_of("gate", self.gate, get_args(Gate))
        _check_one_of("gate_bits", self.gate_bits, (32, 64))
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise SecureError(f"secure: batch must be an int, 1 or more (got {self.batch!r})")
        if self.weights == "public" and self.affine == "secret":
            raise SecureError("secure: affine must be 'public' where weights are (got 'secret')")

    @property
    def secret_weights(self) -> bool:
        return self.weights == "secret"

    @property
    def secret_affine(self) -> bool:
        return (self.affine or self.weights) == "secret"


def _check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise SecureError(f"secure: {name} must be one of {', '.join(map(repr, allowed))} (got {value!r})")


@dataclass(frozen=True)
class Wire:
    """One piece of material; its number is the label of the random stream it is drawn from.

    Kinds, with what the parties draw (their streams) and what is dealt (in a ticket's body):
        mask      both draw words; the value is their sum
        own       the client alone draws words
        bits      both draw bytes; the value is their xor
        product   additive shares of a dealt value, words: the client draws, the server is dealt the rest
        xor       xor shares of a dealt value, bytes: likewise
        keys      bytes dealt to both

    `shape` is in words of 8 bytes (mask, own, product) or in bytes.
    """

    number: int
    kind: Literal["mask", "own", "bits", "product", "xor", "keys"]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * (8 if self.kind in ("mask", "own", "product") else 1)

    def dealt_to(self, party: int) -> bool:
        """Whether it stands in that party's ticket."""
        return self.kind == "keys" or (party == 0 and self.kind in ("product", "xor"))


@dataclass(frozen=True)
class Operand:
    """A value that is opened: the result of a step, or (`kept`) its elements at a mask step's index."""

    value: int
    kept: int | None = None  # the mask step


@dataclass(frozen=True)
class Open:
    """e = x - a, each party's half to the other. `early`: the client's half does not depend on the input."""

    step: int
    operand: Operand
    mask: Wire
    early: bool


@dataclass(frozen=True)
class Give:
    """x_1 - a_1 from the client to the server alone, for linear layers with secret weights."""

    step: int
    operand: Operand
    mask: Wire
    early: bool = False


@dataclass(frozen=True)
class Compare:
    """z = DReLU(x) xor r of the first P channels of an opened operand, and shares of r.

    noise: the parties' random bits c, packed; flip: r, additive [N, P, *S]; material: of the gate's backend.
    """

    step: int
    operand: Operand
    prototypes: int
    noise: Wire
    flip: Wire
    material: tuple[Wire, ...]

    @property
    def gates(self) -> int:
        return prod(self.flip.shape)


@dataclass(frozen=True)
class Linear:
    """A linear step with secret weights: c = op(a_1, B) dealt; a_1 is `source`'s mask at the client."""

    step: int
    source: Open | Give
    product: Wire


@dataclass(frozen=True)
class Gated:
    """x * (alpha gate + beta) of an opened operand; products: what is dealt of a, r, A and B."""

    step: int
    opened: Open
    compare: Compare
    products: tuple[Wire, ...]


@dataclass(frozen=True)
class Local:
    """A step without message or material."""

    step: int


@dataclass(frozen=True)
class Reveal:
    """The last value to the client, under noise below 2^bits where its truncation was left out."""

    step: int
    noise: Wire | None
    bits: int


Action = Open | Give | Compare | Linear | Gated | Local | Reveal


class Protocol:
    """What parties and dealer agree on: program, settings, actions in order, wires."""

    def __init__(self, program: Program, settings: Settings) -> None:
        self.program = program
        self.settings = settings
        compiler = _Compiler(program, settings)
        self.actions: tuple[Action, ...] = tuple(compiler.actions)
        self.wires: tuple[Wire, ...] = tuple(compiler.wires)
        self.early_values: frozenset[int] = frozenset(compiler.early)

    @classmethod
    def compile(cls, program: Program, settings: Settings) -> "Protocol":
        """Raises SecureError for a program without steps."""
        if not program.steps:
            raise SecureError("secure: the program must have steps (got none)")
        return cls(program, settings)

    def shape(self, step: int) -> tuple[int, ...]:
        """Of a step's value, the batch included."""
        return (self.settings.batch, *self.program.steps[step].shape)

    def slices(self, party: int) -> dict[int, slice]:
        """Where each dealt wire lies in that party's ticket body; each begins at a multiple of 8 bytes."""
        found, at = {}, 0
        for wire in self.wires:
            if wire.dealt_to(party):
                found[wire.number] = slice(at, at + wire.bytes)
                at += _whole_words(wire.bytes)
        return found

    def body_bytes(self, party: int) -> int:
        """Bytes of a ticket's body."""
        return sum(_whole_words(wire.bytes) for wire in self.wires if wire.dealt_to(party))

    def masked_params(self) -> dict[str, int]:
        """Weights that stay the server's, with the number of the stream of their mask."""
        roles = ["weight", "scale"] if self.settings.secret_weights else []
        roles += ["alpha", "beta"] if self.settings.secret_affine else []
        used = {step.params[role] for step in self.program.steps for role in roles if role in step.params}
        return {key: number for number, key in enumerate(sorted(self.program.params)) if key in used}

    def known_params(self) -> list[str]:
        """Weights that both parties know."""
        roles = [] if self.settings.secret_weights else ["weight", "scale", "bias", "shift"]
        roles += [] if self.settings.secret_affine else ["alpha", "beta"]
        return sorted({step.params[role] for step in self.program.steps for role in roles if role in step.params})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of program, settings and version."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The same text for the same protocol; tensors as base64 of int64."""
        plain = self.program.to_plain()
        plain["public"] = {key: _text_of(value) for key, value in plain["public"].items()}
        whole = {"protocol": PROTOCOL_VERSION, "settings": asdict(self.settings), "program": plain}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Protocol":
        """Raises SecureError for another protocol version or a text that is none."""
        try:
            whole = json.loads(text)
            version, plain = whole["protocol"], whole["program"]
            if version != PROTOCOL_VERSION:
                raise SecureError(f"secure: the protocol must have version {PROTOCOL_VERSION} (got {version!r})")
            plain["public"] = {key: _tensor_of(value) for key, value in plain["public"].items()}
            plain["steps"] = [_with_tuples(step) for step in plain["steps"]]
            return cls.compile(Program.from_plain(plain), Settings(**whole["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SecureError(f"secure: a protocol's description is damaged: {error!r}") from error


def _text_of(value: torch.Tensor) -> str:
    return base64.b64encode(value.to(torch.int64).contiguous().numpy().tobytes()).decode()


def _tensor_of(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.int64).copy())


def _with_tuples(step: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a Step has tuples."""
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}
    tuples["options"] = {k: tuple(v) if isinstance(v, list) else v for k, v in step["options"].items()}
    return tuples


class _Compiler:
    """Walks the steps once and makes actions and wires; a value is opened once, whoever reads it."""

    def __init__(self, program: Program, settings: Settings) -> None:
        self.actions: list[Action] = []
        self.wires: list[Wire] = []
        self.early: set[int] = set()  # values whose share at the client does not depend on the input
        self._program, self._settings = program, settings
        self._opened: dict[Operand, Open | Give] = {}
        self._compared: dict[tuple[Operand, int], Compare] = {}
        self._to_open = {step.inputs[0] for step in program.steps if step.op in ("relu", "shared", "select")}
        self._to_open |= {step.gates[0] for step in program.steps if step.gates is not None}
        for index, step in enumerate(program.steps):
            self._step(index, step)
        self._reveal(len(program.steps) - 1)

    def _wire(self, kind: Any, *shape: int) -> Wire:
        self.wires.append(Wire(len(self.wires), kind, shape))
        return self.wires[-1]

    def _shape(self, operand: Operand) -> tuple[int, ...]:
        """Of an operand, the batch included; kept elements are one channel."""
        if operand.kept is not None:
            index = self._program.public[self._program.steps[operand.kept].public["index"]]
            return (self._settings.batch, 1, index.numel())
        return (self._settings.batch, *self._program.steps[operand.value].shape)

    def _step(self, index: int, step: Step) -> None:
        if step.op in LINEAR and self._settings.secret_weights:
            product = self._wire("product", *self._shape(Operand(index)))
            self.actions.append(Linear(index, self._masked(index, Operand(step.inputs[0])), product))
            self.early.add(index)
        elif step.op in ("relu", "shared", "mask", "select"):
            self._gated(index, step)
        else:
            self.actions.append(Local(index))
            if step.op != "input" and all(source in self.early for source in step.inputs):
                self.early.add(index)

    def _masked(self, index: int, operand: Operand) -> Open | Give:
        """The client's half of x under a mask of its own: as part of an opening where the value has one."""
        if operand.value in self._to_open:
            return self._open(index, operand)
        if operand not in self._opened:
            given = Give(index, operand, self._wire("own", *self._shape(operand)), operand.value in self.early)
            self._opened[operand] = given
            self.actions.append(given)
        return self._opened[operand]

    def _open(self, index: int, operand: Operand) -> Open:
        found = self._opened.get(operand)
        if not isinstance(found, Open):
            mask = self._wire("mask", *self._shape(operand))
            found = self._opened[operand] = Open(index, operand, mask, operand.value in self.early)
            self.actions.append(found)
        return found

    def _gated(self, index: int, step: Step) -> None:
        x = Operand(step.inputs[0], index if step.op == "mask" else None)
        source, prototypes = x, self._shape(x)[1]
        if step.gates is not None:
            source, prototypes = Operand(step.gates[0]), step.gates[1]
        if prod(self._shape(x)):
            opened, compare = self._open(index, x), self._compare(index, source, prototypes)
            products = self._products(x, secret=step.op == "shared" and self._settings.secret_affine)
            self.actions.append(Gated(index, opened, compare, products))
        else:
            self.actions.append(Local(index))

    def _products(self, x: Operand, *, secret: bool) -> tuple[Wire, ...]:
        """[ar]; with secret alpha and beta also [Ar], [aB + aAr], [aA - 2aAr]."""
        return tuple(self._wire("product", *self._shape(x)) for _ in range(4 if secret else 1))

    def _compare(self, index: int, source: Operand, prototypes: int) -> Compare:
        self._open(index, source)
        key = (source, prototypes)
        if key not in self._compared:
            n, _, *rest = self._shape(source)
            gates = n * prototypes * prod(rest)
            noise, flip = self._wire("bits", packed_bytes(gates)), self._wire("product", n, prototypes, *rest)
            material = tuple(self._tree(gates) if self._settings.gate == "tree" else self._dcf(gates))
            self._compared[key] = Compare(index, source, prototypes, noise, flip, material)
            self.actions.append(self._compared[key])
        return self._compared[key]

    def _dcf(self, gates: int) -> Iterator[Wire]:
        """Roots and keys."""
        yield self._wire("bits", gates, KEY_BYTES)
        yield self._wire("keys", gates, dcf.key_bytes(self._settings.gate_bits - 1))

    def _tree(self, gates: int) -> Iterator[Wire]:
        """Thermometer words; then, per level of n nodes, masks of the ANDs' inputs and their products."""
        nodes = self._settings.gate_bits // BLOCK_BITS
        yield self._wire("xor", nodes, gates, 2)
        while nodes > 1:
            nodes //= 2
            yield self._wire("bits", 3 * nodes - 1, packed_bytes(gates))
            yield self._wire("xor", 2 * nodes - 1, packed_bytes(gates))

    def _reveal(self, last: int) -> None:
        """A linear layer's last truncation is left out, so that no share-dependent bit is opened."""
        linear = self._program.steps[last].op in LINEAR
        noise = self._wire("product", *self._shape(Operand(last))) if linear else None
        self.actions.append(Reveal(last, noise, SCALE_BITS if linear else 0))


def _whole_words(count: int) -> int:
    return count + -count % 8


def packed_bytes(gates: int) -> int:
    """Bytes of so many bits."""
    return (gates + 7) // 8
