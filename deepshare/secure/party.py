"""Process of one party: `python -P party.py RANK FOLDER SIGNAL_FD`, started by launcher.py.

Nothing heavy is imported before the first sign of life, so that the parent can tell a stopped party from a starting
one. The party dies with its parent: its standard input is a pipe that the parent never writes to and that closes with
it.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEAT_SECONDS = 0.25
PEER_LOST = 3  # exit code of a party whose peer went away: the parent then blames the other
PARENT_LOST = 4


class Signals:
    """Lines of JSON to the parent: a beat four times a second with the steps begun and the CPU time used."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._done = 0
        self._place = "starting"
        threading.Thread(target=self._beat, daemon=True).start()

    def progress(self, place: str) -> None:
        """Called before each step; the next beat carries it."""
        self._done += 1
        self._place = place

    def _beat(self) -> None:
        while True:
            line = json.dumps({"done": self._done, "place": self._place, "cpu": time.process_time()}) + "\n"
            try:
                os.write(self._descriptor, line.encode())
            except OSError:
                os._exit(PARENT_LOST)
            time.sleep(BEAT_SECONDS)


def _die_with_parent() -> None:
    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: its lock, held by a thread, aborts the interpreter's exit
        os._exit(PARENT_LOST)

    threading.Thread(target=watch, daemon=True).start()


def _run(rank: int, folder: Path, signals: Signals) -> None:
    import torch

    from deepshare.secure import jobs
    from deepshare.secure.crypten_import import load_crypten
    from deepshare.secure.inference import run_job

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    signals.progress("importing CrypTen")
    crypten = load_crypten()
    signals.progress("connecting")
    crypten.init()
    own_jobs = jobs.load(folder / jobs.JOB_FILE)
    (folder / jobs.JOB_FILE).unlink()  # images and weights do not stay on disk, whatever becomes of the parent
    results: list[dict[str, Any]] = [run_job(crypten, job, signals.progress) for job in own_jobs]
    crypten.communicator.get().barrier()
    jobs.save_beside(results, folder / jobs.RESULT_FILE)
    crypten.uninit()


def main(rank: int, folder: Path, descriptor: int) -> int:
    """Exit code 0 with a result file, PEER_LOST if the connection broke; any other error leaves its traceback."""
    _die_with_parent()
    signals = Signals(descriptor)
    try:
        _run(rank, folder, signals)
    except RuntimeError as error:
        lost = ("onnection closed", "onnection reset", "roken pipe", "Socket closed", "onnection refused", "Timed out")
        if any(phrase in str(error) for phrase in lost):
            print(f"lost the connection to party {1 - rank}: {str(error).splitlines()[0]}", file=sys.stderr)
            return PEER_LOST
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
