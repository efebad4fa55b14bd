"""A ticket: one inference's material for one party, as bytes and as a file.

magic, uint32 length of the header, header (JSON), key, public key, body, SHA-256 of all before
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, frombuffer, uint8

from deepshare.files import write_whole
from deepshare.secure.engine.streams import KEY_BYTES
from deepshare.secure.errors import SecureError

_MAGIC = b"deepshare ticket 1\n"
_DIGEST_BYTES = 32
_HEADER_BYTES_MOST = 4096


@dataclass(frozen=True)
class Ticket:
    """Material of inference `number` of one model version for one party; used once.

    Attributes:
        version: of the model: the server's weight masks belong to it (hex).
        number: of the inference, rising within a version.
        digest: of the protocol it was made for.
        party: 0, the server, or 1, the client.
        key: of the party's stream; secret.
        public_key: of the distributed comparison functions; both parties have it, and it is used for one inference.
        body: corrections (party 0) and comparison keys, in the order of the wires; secret. uint8 [B].
    """

    version: str
    number: int
    digest: str
    party: int
    key: bytes = field(repr=False)
    public_key: bytes = field(repr=False)
    body: Tensor = field(repr=False)

    def to_bytes(self) -> bytes:
        header = {"version": self.version, "number": self.number, "digest": self.digest, "party": self.party}
        text = json.dumps({**header, "body_bytes": self.body.numel()}).encode()
        content = b"".join(
            (_MAGIC, struct.pack(">I", len(text)), text, self.key, self.public_key, self.body.numpy().data)
        )
        return content + hashlib.sha256(content).digest()

    @classmethod
    def from_bytes(cls, content: bytes | bytearray, where: str) -> "Ticket":
        """The ticket of `to_bytes`; `where` is what the error calls it.

        Raises:
            SecureError: no ticket, one of another format, or torn: cut short or changed.
        """
        start = len(_MAGIC) + 4
        if len(content) < start or bytes(content[: len(_MAGIC)]) != _MAGIC:
            raise SecureError(f"secure: {where} must be a ticket that begins with {_MAGIC!r}")
        (length,) = struct.unpack(">I", content[len(_MAGIC) : start])
        view = memoryview(content)
        if (
            hashlib.sha256(view[:-_DIGEST_BYTES]).digest() != bytes(view[-_DIGEST_BYTES:])
            or length > _HEADER_BYTES_MOST
        ):
            raise SecureError(f"secure: {where} is torn: its check sum does not match its {len(content)} bytes")
        header = json.loads(bytes(view[start : start + length]))
        body_bytes = header.pop("body_bytes")
        at = start + length + 2 * KEY_BYTES
        body = frombuffer(bytearray(view[at : at + body_bytes]) or bytearray(1), dtype=uint8)[:body_bytes]
        key, public_key = bytes(view[at - 2 * KEY_BYTES : at - KEY_BYTES]), bytes(view[at - KEY_BYTES : at])
        return cls(**header, key=key, public_key=public_key, body=body)


def ticket_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.ticket"


def write_ticket(folder: Path, ticket: Ticket) -> Path:
    """Writes the ticket whole, readable by its owner alone; returns its path."""
    return write_whole(ticket_path(folder, ticket.number), ticket.to_bytes(), mode=0o600)


def read_ticket(path: Path) -> Ticket:
    """Raises SecureError for a missing or torn file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SecureError(f"secure: ticket {path} cannot be read: {error.strerror}") from error
    return Ticket.from_bytes(content, f"ticket {path}")
