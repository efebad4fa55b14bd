"""What a party draws from a ticket: its random streams and what it was dealt, by wire."""

import torch
from torch import Tensor

from deepshare.secure.engine.protocol import Protocol, Wire
from deepshare.secure.engine.streams import Stream
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError


class Material:
    """One ticket, opened. What the online part needs as bytes is drawn here once and kept.

    Raises:
        SecureError: the ticket was made for another protocol or party, or its body has another length.
    """

    def __init__(self, ticket: Ticket, protocol: Protocol, party: int) -> None:
        if (ticket.digest, ticket.party) != (protocol.digest, party):
            raise SecureError(
                f"secure: ticket {ticket.number} must be of protocol {protocol.digest[:12]} for party {party} "
                f"(got {ticket.digest[:12]} for party {ticket.party})"
            )
        if ticket.body.numel() != protocol.body_bytes(party):
            wanted = protocol.body_bytes(party)
            raise SecureError(f"secure: ticket {ticket.number} must have {wanted} bytes (got {ticket.body.numel()})")
        self.public_key = ticket.public_key
        self._party, self._body = party, ticket.body
        self._stream, self._slices = Stream(ticket.key), protocol.slices(party)
        self.kept: dict[int, Tensor] = {}
        for wire in protocol.wires:
            if wire.kind in ("bits", "xor", "keys"):
                self.kept[wire.number] = self._draw(wire).reshape(wire.shape)
        noise = protocol.actions[-1].noise  # type: ignore[union-attr]
        if noise is not None:
            self.kept[noise.number] = self.words(noise)

    def _draw(self, wire: Wire) -> Tensor:
        """uint8 [bytes]: dealt if it stands in the ticket, else from the stream."""
        if wire.number in self._slices:
            return self._body[self._slices[wire.number]]
        return self._stream.bytes(wire.number, wire.bytes)

    def words(self, wire: Wire) -> Tensor:
        """This party's share of a wire of words, int64 of the wire's shape."""
        return self._draw(wire).view(torch.int64).reshape(wire.shape)

    def bytes(self, wire: Wire) -> Tensor:
        """This party's share of a wire of bytes, for its one use."""
        return self.kept.pop(wire.number)

    def close(self) -> None:
        """Everything is drawn: the key is forgotten."""
        del self._stream, self._body
