"""The error of this package."""


class ReportError(Exception):
    """A report that cannot be written, or a file of results/ that cannot be read; names file, wanted, got."""
