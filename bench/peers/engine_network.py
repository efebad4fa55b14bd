"""A network that is one ReLU, as both parties and the dealer compile it."""

from deepshare.secure.engine.protocol import Protocol, Settings
from deepshare.secure.program import Program, Step


def protocol(elements: int, setting: str) -> Protocol:
    """A ReLU of [1, 1, 1, elements]; setting: gate backend and bits of the comparison, as "tree-64"."""
    gate, bits = setting.split("-")
    shape = (1, 1, elements)
    program = Program((Step("input", "x", (), shape), Step("relu", "relu", (0,), shape)), {}, {})
    return Protocol.compile(program, Settings("public", gate=gate, gate_bits=int(bits)))  # type: ignore[arg-type]
