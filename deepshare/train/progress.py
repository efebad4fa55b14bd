"""What a run says while it goes: a line an epoch on the terminal and in log.txt, and where it is in between."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from torch import Tensor

from deepshare.train.rows import Row

SECONDS_BETWEEN = 0.5  # between two looks at the running loss, each of which waits for the device


class Progress:
    """Report to `stream` (standard output) and to `log`.

    left: epochs to go in the whole run. The ETA takes the seconds that epochs took so far in this process for each of
    them, so it is rough until every phase has been seen.
    """

    def __init__(self, log: Path, stream: TextIO | None = None) -> None:
        self.log, self.stream = log, stream or sys.stdout
        self.left = 0
        self.took: list[float] = []
        self.at, self.steps, self.images = "", 0, 0
        self.epoch_start = self.last_look = time.monotonic()

    def say(self, line: str) -> None:
        """One line, in the log and on the terminal."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._show(f"\r\x1b[K{line}\n" if self.stream.isatty() else f"{line}\n")

    def start_epoch(self, phase: str, epoch: int, epochs: int, steps: int, images: int) -> None:
        self.at = f"{phase:<8} {epoch:>{len(str(epochs))}}/{epochs}"
        self.steps, self.images = steps, images
        self.epoch_start = self.last_look = time.monotonic()

    def after_step(self, done: int, loss_sum: Tensor) -> None:
        """Show the running loss, at most twice a second and only on a terminal."""
        now = time.monotonic()
        if not self.stream.isatty() or now - self.last_look < SECONDS_BETWEEN:
            return
        self.last_look = now
        rate = done * self.images / self.steps / (now - self.epoch_start)
        line = f"{self.at}  step {done}/{self.steps}  loss {float(loss_sum) / done:.4f}  {rate:,.0f} images/s"
        self._show(f"\r\x1b[K{line}")

    def _show(self, text: str) -> None:
        show(text, self.stream)

    def training_seconds(self) -> float:
        """Seconds since the epoch started."""
        return time.monotonic() - self.epoch_start

    def end_epoch(self, row: Row) -> None:
        """The line of an epoch; `row` is what goes into metrics.csv."""
        self.left -= 1
        self.took.append(self.training_seconds())
        accuracy = row["val_accuracy"]
        shown = "none" if accuracy is None else f"{100 * float(accuracy):.2f} %"
        eta = self.left * sum(self.took) / len(self.took)
        gates = f"lasso {row['lasso']:.3g}" if "lasso" in row else f"soft channels {row['soft_channels']:,}"
        self.say(
            f"{self.at}  loss {row['loss']:.4f}  val {shown}  lr {row['lr']:.2g}  "
            f"DReLUs {row['drelus']:,}  {gates}  {row['images_per_second']:,.0f} images/s  ETA {clock(eta)}"
        )


class Silence(Progress):
    """The progress of a rank that is not the first: it takes the time and says nothing."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def say(self, line: str) -> None:
        pass

    def _show(self, text: str) -> None:
        pass


def show(text: str, stream: TextIO) -> None:
    """Write to the stream; once its reader (`| head`) or terminal is gone it leads nowhere and the run goes on."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: of a terminal that was closed
            raise
        # below the stream, not in place of it: what it still holds must go somewhere when Python flushes at its end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
