"""The one error of this package."""


class DataError(Exception):
    """A data set that is unknown, missing, damaged, or cannot be split as asked."""
