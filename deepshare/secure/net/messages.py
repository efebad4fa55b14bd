"""Messages between the processes: a small JSON object each, or bytes announced by one.

    magic "dshr" | version, 16 bits | kind, 16 bits | length, 32 bits | JSON, UTF-8          (big-endian)

The header never changes its layout, so that another version is recognised as such. Anything else than the message that
was expected is refused at once, with what was wanted and what came; contents are never quoted.
"""

import hashlib
import json
import struct
from typing import Any

from deepshare.secure.engine.link import Bytes
from deepshare.secure.errors import SecureError
from deepshare.secure.net.channel import Channel

VERSION = 1  # of the messages and of what the parties compute together
MOST_BYTES = 1 << 16  # of one message's JSON
KINDS = (
    *("hello", "refused", "beat", "bye"),
    *("welcome", "program", "weights", "infer", "offer", "agreed", "done", "end"),
    *("register", "registered", "mask_key", "take", "collect", "ticket"),
)
_MAGIC = b"dshr"
_HEADER = struct.Struct(">4sHHI")


def send(channel: Channel, kind: str, **content: Any) -> None:
    """One message; `content` is JSON."""
    body = json.dumps(content).encode()
    if len(body) > MOST_BYTES:
        raise SecureError(f"secure: a message '{kind}' must be at most {MOST_BYTES} bytes (got {len(body)})")
    channel.send(_HEADER.pack(_MAGIC, VERSION, KINDS.index(kind), len(body)) + body)


def receive(channel: Channel, *kinds: str) -> tuple[str, dict[str, Any]]:
    """The next message, of one of `kinds`: (kind, content).

    Raises:
        SecureError: it is none of ours, of another version or kind, too long, cut short or not JSON; or the peer sent
            'refused', whose reason is then the error.
    """
    wanted = " or ".join(f"'{kind}'" for kind in kinds)
    magic, version, number, length = _HEADER.unpack(channel.recv(_HEADER.size))
    if magic != _MAGIC:
        raise SecureError(f"secure: {channel.peer} sent no message of deepshare (wanted {wanted})")
    if version != VERSION:
        raise SecureError(f"secure: {channel.peer} speaks protocol version {version}, this is version {VERSION}")
    kind = KINDS[number] if number < len(KINDS) else f"number {number}"
    if length > MOST_BYTES:
        raise SecureError(
            f"secure: {channel.peer} sent a message '{kind}' of {length} bytes (at most {MOST_BYTES} are taken)"
        )
    if kind not in (*kinds, "refused"):
        raise SecureError(f"secure: {channel.peer} sent a message '{kind}', wanted {wanted}")
    content = _parse(channel, kind, bytes(channel.recv(length)))
    if kind == "refused" and kind not in kinds:
        raise SecureError(f"secure: {channel.peer} refused: {text(channel, content, 'why')}")
    return kind, content


def _parse(channel: Channel, kind: str, body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SecureError(f"secure: {channel.peer} sent a message '{kind}' that is no JSON object")
    return content


def text(channel: Channel, content: dict[str, Any], key: str) -> str:
    """A string of a message, at most 1,000 printable characters of it: it may be shown to a user."""
    value = _field(channel, content, key, str)
    return "".join(letter for letter in value[:1000] if letter.isprintable())


def number(channel: Channel, content: dict[str, Any], key: str, least: int = 0, most: int = 2**62) -> int:
    """An integer of a message, least..most."""
    value = _field(channel, content, key, int)
    if isinstance(value, bool) or not least <= value <= most:
        raise SecureError(f"secure: {channel.peer} sent {key} out of range (wanted {least}..{most})")
    return value


def numbers(channel: Channel, content: dict[str, Any], key: str, kind: type = float) -> list[Any]:
    """A list of floats, or of ints, of a message."""
    values = _field(channel, content, key, list)
    if len(values) > 4096 or not all(type(value) in (kind, int) for value in values):
        raise SecureError(f"secure: {channel.peer} sent {key} that is no list of numbers")
    return [kind(value) for value in values]


def _field(channel: Channel, content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise SecureError(f"secure: {channel.peer} sent a message whose {key} is no {kind.__name__}")
    return value


def send_bytes(channel: Channel, kind: str, data: Bytes, **content: Any) -> None:
    """A message, then `data`, whose length and SHA-256 it states."""
    send(channel, kind, bytes=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest(), **content)
    channel.send(data)


def receive_bytes(channel: Channel, kind: str, most: int) -> tuple[dict[str, Any], memoryview]:
    """What `send_bytes` sent: (content, data). Raises SecureError also if it is longer than `most` or changed."""
    _, content = receive(channel, kind)
    length = number(channel, content, "bytes")
    if length > most:
        raise SecureError(f"secure: {channel.peer} sent '{kind}' with {length} bytes (at most {most} are taken)")
    data = channel.recv(length)
    if hashlib.sha256(data).hexdigest() != content.get("sha256"):
        raise SecureError(f"secure: {channel.peer} sent '{kind}' with bytes that do not have the stated SHA-256")
    return content, data


def refuse(channel: Channel, why: str) -> None:
    """Tells the peer why, as far as it can be told, and ends the connection."""
    try:
        send(channel, "refused", why=why.removeprefix("secure: "))
    except SecureError:
        channel.close()
    else:
        channel.finish()
