"""Which gate backend a network should be run with on a link: by counts alone, without running either."""

from dataclasses import dataclass, replace

from deepshare.secure.engine import costs
from deepshare.secure.engine.protocol import Gate, Protocol, Settings
from deepshare.secure.program import Program


@dataclass(frozen=True)
class Wire:
    """A link between two machines: round trip in seconds, bandwidth in bytes a second and direction."""

    round_trip: float
    bandwidth: float


LAN = Wire(0.2e-3, 125e6)  # 1 Gb/s
WAN = Wire(40e-3, 12.5e6)  # 100 Mb/s
WIRES = {"lan": LAN, "wan": WAN}

# Evaluating a 64-bit comparison function: 557,056 take 73 ms on a core with VAES; the tree's leaves, left out,
# 4.1 ms (docs/gates.md).
_SECONDS_A_KEY_BIT = 0.13e-6 / 64


def wire_seconds(protocol: Protocol, wire: Wire, *, dealing: bool) -> float:
    """flights * round trip / 2 + bytes / bandwidth: of the busier party online, `dealing` adds the server's ticket."""
    cost = costs.total(protocol)
    sent = cost.one_way + (cost.client_sends_early + cost.dealt_server if dealing else 0)
    return costs.flights(protocol) * wire.round_trip / 2 + sent / wire.bandwidth


def choose_gate(program: Program, settings: Settings, wire: Wire, *, dealing: bool = False) -> Gate:
    """The backend with the fewer seconds on this link.

    The tree takes log2(m / 4) rounds more at every leader; a comparison function is evaluated at every gate, and has a
    key of 16 (m - 7) bytes. So few gates or a long way ask for "dcf", many gates for "tree".

    Args:
        settings: its own gate is not looked at.
        dealing: count the material's way to the server too, not only what is waited for with the input there.
    """
    seconds: dict[Gate, float] = {
        gate: wire_seconds(Protocol.compile(program, replace(settings, gate=gate)), wire, dealing=dealing)
        for gate in ("dcf", "tree")
    }
    seconds["dcf"] += program.total_drelus * settings.batch * settings.gate_bits * _SECONDS_A_KEY_BIT
    return min(seconds, key=lambda gate: seconds[gate])


def settle(program: Program, settings: Settings, gate: str, wire: Wire) -> Settings:
    """The settings with this gate backend; "auto": with the one `choose_gate` names for the link.

    Raises:
        SecureError: a gate of another name.
    """
    return replace(settings, gate=choose_gate(program, settings, wire) if gate == "auto" else gate)  # type: ignore[arg-type]
