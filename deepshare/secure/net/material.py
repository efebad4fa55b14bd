"""A party's tickets on disk, as `deepshare secure deal` wrote them and somebody carried them here.

    FOLDER/deal.json            version, digest of the protocol, party, settings, how many
    FOLDER/mask.key             at the server: of the stream of the weight masks
    FOLDER/00000001.ticket ...

A ticket is burnt before its first use: the ledger has its number, its file and all with lower numbers are gone, then
its bytes are computed with. A death at any point leaves it whole and unused, or used up.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deepshare.secure.engine.streams import KEY_BYTES
from deepshare.secure.engine.ticket import Ticket, read_ticket, ticket_path
from deepshare.secure.errors import SecureError
from deepshare.secure.net.folders import sync_folder
from deepshare.secure.net.ledger import Ledger

FORMAT = 1
PARTIES = ("server", "client")


@dataclass(frozen=True)
class Material:
    """Tickets of one deal for one party.

    Attributes:
        party: 0, the server, or 1, the client.
        version: of the model: the server's weight masks belong to it.
        digest: of the protocol the tickets were made for.
    """

    folder: Path
    party: int
    version: str
    digest: str
    ledger: Ledger

    @classmethod
    def open(cls, folder: Path | str, party: int, keys: Path) -> "Material":
        """The tickets in `folder` for `party`, whose ledger stands in `keys`.

        Raises:
            SecureError: there is no deal in the folder, one of another format, or the other party's.
        """
        folder = Path(folder)
        deal = _read_deal(folder)
        if deal["party"] != party:
            raise SecureError(
                f"secure: --material {folder} must be the {PARTIES[party]}'s (got the {PARTIES[deal['party']]}'s)"
            )
        return cls(folder, party, deal["version"], deal["digest"], Ledger(keys))

    def check_fits(self, digest: str, version: str | None = None) -> None:
        """Raises SecureError if the tickets are of another protocol (model, settings) or model version."""
        if self.digest != digest:
            raise SecureError(
                f"secure: --material {self.folder} was made for another model or other settings "
                f"(protocol {self.digest[:12]}, wanted {digest[:12]})"
            )
        if version is not None and self.version != version:
            raise SecureError(
                f"secure: --material {self.folder} is of model version {self.version[:8]}, "
                f"the server has {version[:8]}: both parties need the same deal"
            )

    def mask_key(self, secret: Mapping[str, Tensor]) -> bytes:
        """The server's key of the weight masks, for these weights and, from now on, for no others.

        Raises:
            SecureError: the file is missing or has another length; the masks were used for other weights.
        """
        path = self.folder / "mask.key"
        try:
            key = path.read_bytes()
        except OSError as error:
            raise SecureError(f"secure: {path} cannot be read: {error.strerror}") from error
        if len(key) != KEY_BYTES:
            raise SecureError(f"secure: {path} is torn: it must have {KEY_BYTES} bytes (got {len(key)})")
        if secret:
            self.ledger.claim(self.version, _fingerprint(key, secret))
        return key

    def remove_used(self) -> list[int]:
        """Removes the files of used numbers (left by a death, or copied back); returns the numbers."""
        last = self.ledger.last(self.version)
        return self._remove_to(last)

    def smallest(self, least: int) -> int | None:
        """The smallest unused number from `least` on that is here."""
        least = max(least, self.ledger.last(self.version) + 1)
        return min((number for number in self._numbers() if number >= least), default=None)

    def take(self, number: int) -> Ticket:
        """Burns ticket `number` and all before it, and gives it.

        Raises:
            SecureError: it was used before, is torn, or is of another version, protocol, party or number than its
                folder and name say. It is then burnt all the same: the other party has burnt its half.
        """
        path = ticket_path(self.folder, number)
        self.ledger.use(self.version, number)
        try:
            ticket = read_ticket(path)
        finally:
            self._remove_to(number)
        found = (ticket.version, ticket.digest, ticket.party, ticket.number)
        if found != (self.version, self.digest, self.party, number):
            raise SecureError(
                f"secure: ticket {path} must be number {number} of version {self.version[:8]} for the "
                f"{PARTIES[self.party]} (got number {ticket.number} of {ticket.version[:8]} for party {ticket.party})"
            )
        return ticket

    def _numbers(self) -> list[int]:
        names = (path.stem for path in self.folder.glob("*.ticket"))
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _remove_to(self, last: int) -> list[int]:
        gone = [number for number in self._numbers() if number <= last]
        for number in gone:
            ticket_path(self.folder, number).unlink(missing_ok=True)
        if gone:
            sync_folder(self.folder)
        return gone


def _read_deal(folder: Path) -> dict[str, Any]:
    path = folder / "deal.json"
    try:
        deal = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SecureError(f"secure: --material {folder} holds no deal ({path.name} is missing)") from error
    except ValueError as error:
        raise SecureError(f"secure: {path} is torn: it is no JSON") from error
    kinds = {"format": int, "version": str, "digest": str, "party": int}
    if not isinstance(deal, dict) or any(type(deal.get(key)) is not kind for key, kind in kinds.items()):
        raise SecureError(f"secure: {path} must be a deal's description with {', '.join(kinds)}")
    if deal["format"] != FORMAT or deal["party"] not in (0, 1):
        raise SecureError(f"secure: {path} must have format {FORMAT} (got {deal['format']})")
    return deal


def _fingerprint(key: bytes, weights: Mapping[str, Tensor]) -> str:
    """Tells weights from others, to whoever has the key alone."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for name, weight in sorted(weights.items()):
        digest.update(f"|{name}{list(weight.shape)}".encode())
        digest.update(weight.contiguous().numpy().data.cast("B") if weight.numel() else b"")
    return digest.hexdigest()
