"""Files that appear whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path | str, content: bytes | str, *, mode: int = 0o666) -> Path:
    """Write `content` beside `path`, then rename: a reader or a killed run never sees half a file.

    A link is followed: its target is replaced, not the link. A new file has the permissions `mode`, less the umask.

    Raises:
        OSError: the folder is missing or not writable, or `path` is a folder or a device; it is then as it was.
    """
    given, path = Path(path), Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: must be a file to be replaced, it is none")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: its folder does not exist") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return given
