"""The process side of processes.py: `python -P child.py MODULE FOLDER GIVEN_FD RESULT_FD SIGNAL_FD [SOCKET_FD ...]`.

Nothing heavy is imported before the first sign of life, so that the parent can tell a stopped process from a starting
one. The process dies with its parent: its standard input is a pipe that the parent never writes to and that closes with
it. It then removes FOLDER, the run's working folder, as nobody else is left to.
"""

import importlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

BEAT_SECONDS = 0.25
PEER_LOST = 3  # exit code of a process whose peer went away: the parent then blames the other
PARENT_LOST = 4


class Signals:
    """Lines of JSON to the parent: four times a second a beat with the steps begun, images done and CPU time used."""

    def __init__(self, descriptor: int, folder: Path) -> None:
        self._descriptor = descriptor
        self._folder = folder
        self._done = 0
        self._images = 0
        self._place = "starting"
        threading.Thread(target=self._beat, daemon=True).start()

    def progress(self, place: str) -> None:
        """Called before each step; the next beat carries it."""
        self._done += 1
        self._place = place

    def finished(self, images: int) -> None:
        """Called after each batch."""
        self._images += images

    def _beat(self) -> None:
        while True:
            beat = {"done": self._done, "images": self._images, "place": self._place, "cpu": time.process_time()}
            try:
                os.write(self._descriptor, f"{json.dumps(beat)}\n".encode())
            except OSError:
                _end_without_parent(self._folder)
            time.sleep(BEAT_SECONDS)


def _die_with_parent(folder: Path) -> None:
    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: its lock, held by a thread, aborts the interpreter's exit
        _end_without_parent(folder)

    threading.Thread(target=watch, daemon=True).start()


def _end_without_parent(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # the other party does the same, perhaps now
    os._exit(PARENT_LOST)


def main(module: str, folder: Path, given_file: int, result_file: int, descriptor: int, *sockets: int) -> int:
    """Exit code 0 when done, PEER_LOST if a connection broke; any other error leaves its traceback.

    Args:
        module: whose `work(given, signals, sockets)` is run; a ConnectionError of it means that a peer went away.
        folder: the run's working folder, for the run alone: removed if the parent goes.
        given_file, result_file, descriptor: open files to read what was given from, to write the result and beats to.
    """
    _die_with_parent(folder)
    signals = Signals(descriptor, folder)
    work = importlib.import_module(module).work
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with open(given_file, "rb") as file:
        file.seek(0)
        given = torch.load(file, weights_only=True)
    try:
        result = work(given, signals, sockets)
    except ConnectionError as error:
        print(error, file=sys.stderr)
        return PEER_LOST
    with open(result_file, "wb") as file:
        torch.save(result, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])))
