"""Work in fresh processes on this machine, watched: what `run` measures with, under either engine.

A process that dies is noticed within a second, one that is stopped or hangs within `stall_seconds`; either ends the run
with a SecureError, all processes gone and the working folder removed. child.py is the other side.

What a process is given and gives back are open files without a name: they are gone from the disk with the last process
that has them open, whatever kills it.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from deepshare.secure.child import PEER_LOST
from deepshare.secure.errors import SecureError

SCRIPT = Path(__file__).with_name("child.py")
STALL_SECONDS = 25.0
POLL_SECONDS = 0.05
WORK_SECONDS = 0.25  # CPU time that counts as progress within one long step; a waiting process's beats use a tenth
GRACE_SECONDS = 0.4  # when one dies the others follow: wait for all before saying whose fault it was

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Task:
    """One process's work.

    Attributes:
        label: as errors call it.
        module: whose `work(given, signals, sockets)` it runs; what that returns is the result.
        given: plain values and tensors; nobody else sees them.
        sockets: open sockets it inherits, closed here once it has them.
        environment: variables beside this process's own.
        command: what its command line begins with.
    """

    label: str
    module: str
    given: Any = field(repr=False)
    sockets: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


@dataclass
class Process:
    """A process as the parent sees it."""

    label: str
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


def run_tasks(
    make_tasks: Callable[[Path], Sequence[Task]],
    *,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress | None = None,
    images: int = 0,
) -> list[Any]:
    """Runs the tasks side by side, one core each; what each returned, in their order.

    Args:
        make_tasks: is given the run's working folder, which is removed at the end.
        stall_seconds: a process silent, or all without progress, for that long ends the run.
        progress: called with (0, images), then as images are done, at most some times a second, last with all done.
        images: in all.

    Raises:
        SecureError: a process died, stopped or hung (which, how, last line of its stderr).
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepshare-secure-")))
        processes = [_start(task, number, folder, stack) for number, task in enumerate(make_tasks(folder))]
        tell = _Teller(progress, images)
        _watch(processes, stall_seconds, lambda: tell(min(images, max(process.images for process in processes))))
        tell(images)  # the last beats may be older than the last images
        return [_load(process.result) for process in processes]


def _start(task: Task, number: int, folder: Path, stack: ExitStack) -> Process:
    stderr = folder / f"{number}.stderr"
    result = stack.enter_context(_nameless(folder))
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    with open(writing, "wb") as signals, open(stderr, "wb") as errors, _nameless(folder) as given:
        torch.save(task.given, given)
        given.flush()
        files = (given.fileno(), result.fileno(), signals.fileno(), *task.sockets)
        process = subprocess.Popen(
            [*task.command, sys.executable, "-P", str(SCRIPT), task.module, str(folder), *map(str, files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=files,
            env=_environment(task),
        )
    for descriptor in task.sockets:
        os.close(descriptor)
    stack.callback(_end, process)
    return Process(task.label, stderr, process, reading, result)


def _environment(task: Task) -> dict[str, str]:
    """One core a process, this package first."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    own = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": package_root if not path else package_root + os.pathsep + path,
    }
    return {**os.environ, **own, **task.environment}


def _nameless(folder: Path) -> IO[bytes]:
    """An empty file on `folder`'s disk that has no name (O_TMPFILE)."""
    return tempfile.TemporaryFile(dir=folder)


def _load(result: IO[bytes]) -> Any:
    """Tensors and plain values only: no code is run."""
    result.seek(0)
    return torch.load(result, weights_only=True)


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


def _watch(processes: list[Process], stall_seconds: float, on_beats: Callable[[], None]) -> None:
    """Returns when both ended well; raises SecureError as soon as one cannot any more."""
    looked = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.signals, selectors.EVENT_READ, process)
        while any(process.process.poll() is None for process in processes):
            for key, _ in selector.select(POLL_SECONDS):
                if not key.data.listen():
                    selector.unregister(key.fd)
            on_beats()
            if not selector.get_map():
                time.sleep(POLL_SECONDS)
            if any(process.process.poll() not in (None, 0) for process in processes):
                break
            looked = _forgive_own_pause(processes, looked)
            _check_alive(processes, stall_seconds)
    if any(process.process.poll() != 0 for process in processes):
        raise _obituary(processes)


def _forgive_own_pause(processes: list[Process], looked: float) -> float:
    """A parent that was suspended itself (Ctrl-Z) must not blame the parties for the time; returns now."""
    now = time.monotonic()
    if now - looked > 1.0:
        for process in processes:
            process.heard += now - looked
            process.moved += now - looked
    return now


def _check_alive(processes: list[Process], stall_seconds: float) -> None:
    """A stopped process sends no beats; two that wait for each other send beats but begin no step and use no CPU."""
    now = time.monotonic()
    running = [process for process in processes if process.process.poll() is None]
    for process in running:
        if now - process.heard > stall_seconds / 2:
            silence = f"gave no sign of life for {now - process.heard:.1f} s (stopped?)"
            raise SecureError(f"secure: {process.label} {silence}, at '{process.place}'{process.last_words()}")
    if running and all(now - process.moved > stall_seconds for process in running):
        places = ", ".join(f"{process.label} at '{process.place}'" for process in running)
        raise SecureError(f"secure: no progress for {stall_seconds:g} s: {places}{running[0].last_words()}")


def _obituary(processes: list[Process]) -> SecureError:
    """Blames a party killed by a signal first, then one that failed by itself, then one that lost its peer."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    dead = [process for process in processes if process.process.poll() not in (None, 0)]
    culprit = min(dead, key=lambda process: _blame(process.process.returncode))
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
