"""What several commands read alike from the command line."""


class ArgumentError(ValueError):
    """An argument of the command line that argparse lets pass."""


def ints(flag: str, text: str, digits: int = 9) -> tuple[int, ...]:
    """The ints in `text`, commas between, `digits` long at most. Raises ArgumentError naming `flag`."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= digits for part in parts):
        raise ArgumentError(f"{flag} must be ints with commas between, as 2,2,2 (got {text!r:.80})")
    return tuple(map(int, parts))
