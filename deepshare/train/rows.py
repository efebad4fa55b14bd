"""Metrics of a run: one row an epoch, and the file that holds them."""

import csv
import io
from collections.abc import Iterable

Row = dict[str, str | int | float | None]  # None: no validation images
COLUMNS = (
    "phase", "epoch", "loss", "val_accuracy", "lr", "drelus", "soft_channels", "images_per_second", "seconds",
    "lasso", "site_drelus",  # of the phase masks: lambda of the epoch; DReLUs by site in call order
)  # fmt: skip


def to_csv(rows: Iterable[Row]) -> str:
    """The text of metrics.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
