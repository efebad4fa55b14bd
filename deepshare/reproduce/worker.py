"""One run in a process of its own: `python -m deepshare.reproduce.worker`, told what to do on its standard input.

Exit status: that of its outcome; what a run can fail of is one line on stderr.
"""

import os
import pickle
import sys
import threading

import torch

from deepshare.reproduce.outcome import attempt

PARENT_LOST = 4


def _end_with_parent() -> None:
    """Standard input is a pipe that stays open as long as the parent lives. A run that ends anywhere can go on."""

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: its lock, held by a thread, aborts the interpreter's exit
        os._exit(PARENT_LOST)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Do the one run that was given."""
    run, settings, minutes, threads = pickle.load(sys.stdin.buffer)
    _end_with_parent()
    torch.set_num_threads(threads)
    outcome = attempt(run, settings, minutes)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
