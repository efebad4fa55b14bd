"""Starts the parties, and with provider TTP the dealer, as fresh processes on loopback; watches and hears them.

A party that dies is noticed within a second, one that is stopped or hangs within `stall_seconds`; either ends the run
with a SecureError, all processes gone and the working folder removed.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from deepshare.secure.baseline import jobs
from deepshare.secure.baseline.crypten_import import require_crypten
from deepshare.secure.baseline.party import PEER_LOST
from deepshare.secure.errors import SecureError

ROLES = ("server", "client", "dealer")
PARTIES, CLIENT = 2, 1
SCRIPT = Path(__file__).with_name("party.py")
STALL_SECONDS = 25.0
POLL_SECONDS = 0.05
WORK_SECONDS = 0.25  # CPU time that counts as progress within one long step; a waiting party's beats use a tenth of it
GRACE_SECONDS = 0.4  # when one party dies the other follows: wait for both before saying whose fault it was


Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Place:
    """Where a process runs: what its command line begins with, and the interface gloo uses (None: loopback)."""

    command: tuple[str, ...] = ()
    interface: str | None = None


@dataclass
class Party:
    """A party's or the dealer's process as the parent sees it."""

    rank: int
    stderr: Path
    process: subprocess.Popen[bytes]
    signals: int  # read end of the pipe of beats
    result: IO[bytes]
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    done: int = -1
    images: int = 0
    cpu: float = 0.0
    place: str = "starting"
    _rest: bytes = b""

    @property
    def label(self) -> str:
        return "the dealer" if self.rank == PARTIES else f"party {self.rank} ({ROLES[self.rank]})"

    def listen(self) -> bool:
        """Takes the beats that have come; False at the end of the pipe."""
        data = os.read(self.signals, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        now = time.monotonic()
        for line in lines:
            beat = json.loads(line)
            self.heard, self.images = now, beat["images"]
            if beat["done"] != self.done or beat["cpu"] > self.cpu + WORK_SECONDS:
                self.done, self.place, self.cpu, self.moved = beat["done"], beat["place"], beat["cpu"], now
        return bool(data)

    def last_words(self) -> str:
        """Last line it wrote to stderr."""
        lines = self.stderr.read_text(errors="replace").strip().splitlines()
        return f"; last line of its stderr: {lines[-1].strip()}" if lines else "; its stderr is empty"


def run_jobs(
    job_list: Sequence[jobs.Job],
    *,
    provider: jobs.Provider = "TFP",
    stall_seconds: float = STALL_SECONDS,
    progress: Progress | None = None,
    places: Sequence[Place] = (Place(), Place(), Place()),
) -> list[list[dict[str, Any]]]:
    """Runs the jobs one after another in one pair of processes; results[rank][job] as inference.run_job returns them.

    Args:
        job_list: each party is given its own view of each job; the dealer none.
        provider: "TFP": party 0 makes the triples. "TTP": a third process does.
        stall_seconds: a party silent, or both without progress, for that long ends the run.
        places: of the processes, by rank: network namespaces, for a benchmark.
        progress: called with (0, images), then as images are done, at most some times a second, last with all done.

    Raises:
        SecureError: CrypTen is missing; a party died, stopped or hung (which, how, last line of its stderr).
    """
    require_crypten()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepshare-secure-")))
        ranks = range(PARTIES + (provider == "TTP"))
        parties = [_start(rank, provider, places[rank], folder, job_list, stack) for rank in ranks]
        total = sum(len(job.images) for job in job_list)
        tell = _Teller(progress, total)
        _watch(parties, stall_seconds, lambda: tell(parties[CLIENT].images))
        tell(total)  # the parties' last beats may be older than their last images
        return [jobs.load(party.result) for party in parties[:PARTIES]]


def _start(
    rank: int, provider: jobs.Provider, place: Place, folder: Path, job_list: Sequence[jobs.Job], stack: ExitStack
) -> Party:
    stderr = folder / f"{ROLES[rank]}.stderr"
    result = stack.enter_context(jobs.nameless(folder))
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    with open(writing, "wb") as signals, open(stderr, "wb") as errors, jobs.nameless(folder) as job:
        jobs.save([job.view(rank) for job in job_list if rank < PARTIES], job)
        given = (job.fileno(), result.fileno(), signals.fileno())
        process = subprocess.Popen(
            [*place.command, sys.executable, "-P", str(SCRIPT), str(rank), provider, str(folder), *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=given,
            env=_environment(rank, folder) | ({"GLOO_SOCKET_IFNAME": place.interface} if place.interface else {}),
        )
    stack.callback(_end, process)
    return Party(rank, stderr, process, reading, result)


def _environment(rank: int, folder: Path) -> dict[str, str]:
    """One core a process, a fresh rendezvous, gloo kept on the loopback interface."""
    package_root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(PARTIES),  # CrypTen adds the dealer, rank 2, by itself
        "RENDEZVOUS": f"file://{folder}/rendezvous",
        "DISTRIBUTED_BACKEND": "gloo",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": package_root if not path else package_root + os.pathsep + path,
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        own["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {**os.environ, **own}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what still runs (a stopped process too) and reaps it."""
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class _Teller:
    """Passes a number of images done on to `progress`, each number once."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._told = progress, total, -1

    def __call__(self, done: int) -> None:
        if self._progress is not None and done > self._told:
            self._told = done
            self._progress(done, self._total)


def _watch(parties: list[Party], stall_seconds: float, on_beats: Callable[[], None]) -> None:
    """Returns when both ended well; raises SecureError as soon as one cannot any more."""
    looked = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for party in parties:
            selector.register(party.signals, selectors.EVENT_READ, party)
        while any(party.process.poll() is None for party in parties):
            for key, _ in selector.select(POLL_SECONDS):
                if not key.data.listen():
                    selector.unregister(key.fd)
            on_beats()
            if not selector.get_map():
                time.sleep(POLL_SECONDS)
            if any(party.process.poll() not in (None, 0) for party in parties):
                break
            looked = _forgive_own_pause(parties, looked)
            _check_alive(parties, stall_seconds)
    if any(party.process.poll() != 0 for party in parties):
        raise _obituary(parties)


def _forgive_own_pause(parties: list[Party], looked: float) -> float:
    """A parent that was suspended itself (Ctrl-Z) must not blame the parties for the time; returns now."""
    now = time.monotonic()
    if now - looked > 1.0:
        for party in parties:
            party.heard += now - looked
            party.moved += now - looked
    return now


def _check_alive(parties: list[Party], stall_seconds: float) -> None:
    """A stopped process sends no beats; two that wait for each other send beats but begin no step and use no CPU."""
    now = time.monotonic()
    running = [party for party in parties if party.process.poll() is None]
    for party in running:
        if now - party.heard > stall_seconds / 2:
            silence = f"gave no sign of life for {now - party.heard:.1f} s (stopped?)"
            raise SecureError(f"secure: {party.label} {silence}, at '{party.place}'{party.last_words()}")
    if running and all(now - party.moved > stall_seconds for party in running):
        places = ", ".join(f"{party.label} at '{party.place}'" for party in running)
        raise SecureError(f"secure: no progress for {stall_seconds:g} s: {places}{running[0].last_words()}")


def _obituary(parties: list[Party]) -> SecureError:
    """Blames a party killed by a signal first, then one that failed by itself, then one that lost its peer."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(party.process.poll() is None for party in parties):
        time.sleep(POLL_SECONDS)
    dead = [party for party in parties if party.process.poll() not in (None, 0)]
    culprit = min(dead, key=lambda party: _blame(party.process.returncode))
    code = culprit.process.returncode
    how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return SecureError(f"secure: {culprit.label} {how} at '{culprit.place}'{culprit.last_words()}")


def _blame(code: int) -> int:
    if code < 0:
        return 0
    return 2 if code == PEER_LOST else 1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
