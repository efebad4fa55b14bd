"""The errors of this package."""


class RecipeError(Exception):
    """A recipe that is missing, cannot be read, or asks for something impossible; names file, key, wanted, got."""


class TrainingError(Exception):
    """A run that cannot start, go on or be resumed; nothing written before is touched."""


class ArtifactError(TrainingError):
    """How a phase ended, on disk, but damaged or of another run; names the file, what was wanted and what came."""


class TrainingPaused(Exception):  # noqa: N818 - a pause is no error
    """A run that stopped in time, with everything saved; a later call goes on.

    phase: where it stands; epoch: epochs of that phase that are done, of `epochs`; left: epochs of the whole run
    """

    def __init__(self, phase: str, epoch: int, epochs: int, left: int, reason: str = "the next epoch would not fit"):
        super().__init__(f"paused in {phase} after epoch {epoch} of {epochs}, {left} epochs are left: {reason}")
        self.phase, self.epoch, self.epochs, self.left = phase, epoch, epochs, left


def require(holds: bool, message: str) -> None:
    """Raises RecipeError with `message` unless `holds`."""
    if not holds:
        raise RecipeError(message)
