"""Files that appear whole or not at all."""

import hashlib
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
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk names no file
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
        raise
    return given


def link_whole(source: Path | str, path: Path | str) -> Path:
    """`path` becomes another name of the file `source` (a copy where there are no links), whole or not at all.

    For files that are only ever replaced, never written to: what is done to one name is done to both. A symbolic link
    is followed: `path` is the file itself, wherever it is moved.

    Raises:
        OSError: as write_whole, or `source` cannot be read.
    """
    source, path = Path(source), Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        os.link(os.path.realpath(source), beside)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: cannot be linked to {path}: one of them is nowhere") from error
    except OSError:  # another file system, or one without links
        return write_whole(path, source.read_bytes())
    try:
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # a rename of one name of a file to another does nothing
    return path


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
