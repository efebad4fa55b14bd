"""Tables as text, for terminals and as Markdown."""

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Rows under each other, the first `left` columns to the left, the others to the right; an empty row is a rule.

    >>> print(aligned([("site", "DReLUs"), (), ("stem", "16")], left=1))
    site  DReLUs
    ------------
    stem      16
    """
    filled = [row for row in rows if row]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(_line(row, widths, left) if row else rule for row in rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "| --- " + "| ---: " * (len(header) - 1) + "|", *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [
        f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells)
