"""The errors of this package."""


class RecipeError(Exception):
    """A recipe that is missing, cannot be read, or asks for something impossible; names file, key, wanted, got."""


class TrainingError(Exception):
    """A run that cannot start, go on or be resumed; nothing written before is touched."""


def require(holds: bool, message: str) -> None:
    """Raises RecipeError with `message` unless `holds`."""
    if not holds:
        raise RecipeError(message)
