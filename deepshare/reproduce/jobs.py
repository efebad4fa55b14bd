"""Several runs, one after the other in this process or side by side in processes of their own."""

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO

import torch

from deepshare.reproduce.chain import Settings
from deepshare.reproduce.outcome import STATUS, Outcome, attempt
from deepshare.reproduce.runs import Run
from deepshare.train.distributed import Ranks

END_SECONDS = 10  # for a process that was asked to end
LEAST_MINUTES = 1e-6  # what `train` takes as no time at all: it trains one epoch


class Deadline:
    """A number of minutes from now, or none."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def minutes_left(self) -> float | None:
        """Never below 0; None without a deadline."""
        return None if self._end is None else max(0.0, (self._end - time.monotonic()) / 60)


def run_all(
    runs: Sequence[Run], settings: Settings, ranks: Ranks, *, jobs: int, deadline: Deadline, say: Callable[[str], None]
) -> list[Outcome]:
    """Attempt every run, `jobs` at a time; their outcomes, in the order of `runs`.

    runs: each after the one that counts for it, if that is among them. With one job they run here (among `ranks`), with
    more in processes with as many threads each as there are cores for it, whose lines `say` gets with the run's name
    before them. A run that cannot begin in time is paused; one whose counts failed has failed.
    """
    turn = _Turn(settings, deadline)
    if jobs == 1:
        for run in runs:
            forgone, minutes = ranks.from_writer(lambda run=run: (turn.forgone(run), turn.minutes))  # type: ignore[misc]
            turn.ended[run] = forgone or attempt(run, settings, minutes, ranks)
    else:
        with ThreadPoolExecutor(jobs) as threads, Workers(jobs, say) as workers:  # processes end before threads do
            _side_by_side(runs, jobs, turn, lambda run: threads.submit(workers.attempt, run, settings, turn.minutes))
    return [turn.ended[run] for run in runs]


class _Turn:
    """Whose turn it is: what has ended, and whether another run may begin."""

    def __init__(self, settings: Settings, deadline: Deadline) -> None:
        self._settings, self._deadline = settings, deadline
        self._training = False
        self.ended: dict[Run, Outcome] = {}

    @property
    def minutes(self) -> float | None:
        """What is left for the run that begins now; None without a deadline."""
        left = self._deadline.minutes_left
        return None if left is None else max(left, LEAST_MINUTES)

    @property
    def _paused(self) -> bool:
        return any(outcome.state == "paused" for outcome in self.ended.values())

    def forgone(self, run: Run) -> Outcome | None:
        """The outcome of a run that does not begin; None if it does.

        The first one of a call with anything to train always does, so that calls come to an end. After a pause none
        does: `train` trains an epoch at least, perhaps of the very phase that had no time for another.
        """
        before = None if run.counts is None else self.ended.get(run.counts)
        if before is not None and before.state == "failed":
            return Outcome(run, "failed", f"{before.run.place}, whose masks weigh its sites, failed")
        if before is not None and before.state == "paused":
            return Outcome(run, "paused")
        if not self._settings.ended(run):
            if self._training and (self._deadline.minutes_left == 0 or self._paused):
                return Outcome(run, "paused")
            self._training = True
        return None


def _side_by_side(runs: Sequence[Run], jobs: int, turn: _Turn, begin: Callable[[Run], Future[Outcome]]) -> None:
    waiting, going = list(runs), dict[Future[Outcome], Run]()
    while waiting or going:
        ready = [run for run in waiting if run.counts not in waiting and run.counts not in going.values()]
        for run in ready[: jobs - len(going)]:
            waiting.remove(run)
            if (outcome := turn.forgone(run)) is not None:
                turn.ended[run] = outcome
            else:
                going[begin(run)] = run
        for future in wait(going, return_when=FIRST_COMPLETED).done:
            turn.ended[going.pop(future)] = future.result()


class Workers:
    """Processes that each do one run (`deepshare.reproduce.worker`). Leaving the context ends those that go."""

    def __init__(self, jobs: int, say: Callable[[str], None]) -> None:
        self._threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // jobs))
        self._say, self._speaking, self._heard = say, threading.Lock(), True
        self._going: set[subprocess.Popen[bytes]] = set()
        self._changing, self._ending = threading.Lock(), False

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._ending = True
            going = list(self._going)
        for process in going:
            process.terminate()
        for process in going:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def attempt(self, run: Run, settings: Settings, minutes: float | None) -> Outcome:
        """`outcome.attempt` in a process of its own; a process that dies of something else has failed."""
        command = [sys.executable, "-m", "deepshare.reproduce.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        with self._changing:
            if self._ending:
                return Outcome(run, "paused")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
            self._going.add(process)
        said: list[str] = []
        with process:
            relays = [self._relay(run, process.stdout, []), self._relay(run, process.stderr, said)]
            try:
                pickle.dump((run, settings, minutes, self._threads), process.stdin)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it died at once; its status says of what
            for relay in relays:
                relay.join()
            status = process.wait()
        with self._changing:
            self._going.discard(process)
        return _outcome(run, status, said)

    def _relay(self, run: Run, lines: IO[bytes], said: list[str]) -> threading.Thread:
        """A thread that says every line with the run's place before it and keeps the last one in `said`."""

        def work() -> None:
            for raw in lines:
                said[:] = [raw.decode(errors="replace").rstrip()]
                self._tell(f"{run.place}  {said[0]}")

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _tell(self, line: str) -> None:
        """Say `line`. Once that fails, as when the reader of stdout is gone (`| head`), the runs go on unheard."""
        with self._speaking:
            try:
                if self._heard:
                    self._say(line)
            except Exception as error:  # any: a relay that ends here leaves its process stuck at a full pipe
                self._heard = False
                if not isinstance(error, OSError):
                    traceback.print_exc()


def _outcome(run: Run, status: int, said: list[str]) -> Outcome:
    states = {number: state for state, number in STATUS.items()}
    if status in (STATUS["done"], STATUS["paused"]):
        return Outcome(run, states[status])
    last = said[0] if said else "no word on stderr"
    return Outcome(run, "failed", last if status == STATUS["failed"] else f"its process ended with {status}: {last}")
