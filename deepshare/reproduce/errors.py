"""The errors of this package."""


class ReproduceError(Exception):
    """A call that asks for what is not there, or a result that cannot be read; names file, wanted, got."""


def require(holds: bool, message: str) -> None:
    """Raises ReproduceError with `message` unless `holds`."""
    if not holds:
        raise ReproduceError(message)
