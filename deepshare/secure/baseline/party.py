"""Process of one party, or of provider TTP's dealer, started by launcher.py:

    python -P party.py RANK PROVIDER FOLDER JOB_FD RESULT_FD SIGNAL_FD

Nothing heavy is imported before the first sign of life, so that the parent can tell a stopped party from a starting
one. The party dies with its parent: its standard input is a pipe that the parent never writes to and that closes with
it. It then removes FOLDER, the run's working folder, as nobody else is left to.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

DEALER = 2  # its rank, with provider TTP
BEAT_SECONDS = 0.25
PEER_LOST = 3  # exit code of a party whose peer went away: the parent then blames the other
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


def _run(rank: int, provider: str, job_file: int, result_file: int, signals: Signals) -> None:
    import torch

    from deepshare.secure.baseline.crypten_import import load_crypten

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    signals.progress("importing CrypTen")
    crypten = load_crypten()
    crypten.cfg.mpc.provider = provider
    signals.progress("connecting")
    if rank == DEALER:
        from deepshare.secure.baseline.dealer import serve

        serve(crypten, lambda: signals.progress("dealing"))
    else:
        _run_jobs(crypten, job_file, result_file, signals)


def _run_jobs(crypten: Any, job_file: int, result_file: int, signals: Signals) -> None:
    from deepshare.secure.baseline import jobs
    from deepshare.secure.baseline.inference import run_job

    crypten.init()
    with open(job_file, "rb") as file:
        own_jobs = jobs.load(file)
    results: list[dict[str, Any]] = [run_job(crypten, job, signals.progress, signals.finished) for job in own_jobs]
    crypten.communicator.get().barrier()
    with open(result_file, "wb") as file:
        jobs.save(results, file)
    crypten.uninit()


def main(rank: int, provider: str, folder: Path, job_file: int, result_file: int, descriptor: int) -> int:
    """Exit code 0 when done, PEER_LOST if a connection broke; any other error leaves its traceback.

    Args:
        rank: 0 the server, 1 the client, 2 the dealer; provider: TFP or TTP, CrypTen's names.
        folder: the run's working folder, for the run alone: removed if the parent goes.
        job_file, result_file, descriptor: open files to read the jobs from, to write the results and the beats to.
    """
    _die_with_parent(folder)
    signals = Signals(descriptor, folder)
    try:
        _run(rank, provider, job_file, result_file, signals)
    except RuntimeError as error:
        lost = ("onnection closed", "onnection reset", "roken pipe", "Socket closed", "onnection refused", "Timed out")
        if any(phrase in str(error) for phrase in lost):
            print(f"party {rank} lost a connection: {str(error).splitlines()[0]}", file=sys.stderr)
            return PEER_LOST
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:7])))
