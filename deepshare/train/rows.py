"""Metrics of a run: one row an epoch, and the file that holds them."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from deepshare.train.errors import require

Row = dict[str, str | int | float | None]  # None: no validation images
COLUMNS = (
    "phase", "epoch", "loss", "val_accuracy", "lr", "drelus", "soft_channels", "images_per_second", "seconds",
    "lasso", "site_drelus",  # of the phase masks: lambda of the epoch; DReLUs by site in call order
)  # fmt: skip
_ALWAYS = frozenset(COLUMNS[: COLUMNS.index("lasso")])
_TEXT = ("phase", "site_drelus")


def check_rows(rows: Sequence[Any]) -> None:
    """Whether JSON values are the metrics of epochs. Raises RecipeError naming the first row that is none."""
    require(len(rows) > 0, "rows: wanted at least one")
    for number, row in enumerate(rows):
        fits = isinstance(row, dict) and _ALWAYS <= row.keys() <= set(COLUMNS) and all(map(_fits, row, row.values()))
        wanted = f"{', '.join(COLUMNS)}, finite numbers but for {' and '.join(_TEXT)}"
        require(fits, f"rows[{number}]: wanted {wanted}, got {row!r:.80}")


def _fits(column: str, value: object) -> bool:
    if column in _TEXT:
        return isinstance(value, str)
    return value is None or (type(value) in (int, float) and -math.inf < value < math.inf)  # type: ignore[operator]


def to_csv(rows: Iterable[Row]) -> str:
    """The text of metrics.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
