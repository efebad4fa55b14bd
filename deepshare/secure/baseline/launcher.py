"""The parties, and with provider TTP the dealer, as processes on loopback over gloo."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepshare.secure.baseline import jobs
from deepshare.secure.baseline.crypten_import import require_crypten
from deepshare.secure.processes import STALL_SECONDS, Progress, Task, run_tasks

LABELS = ("party 0 (server)", "party 1 (client)", "the dealer")
PARTIES = 2


@dataclass(frozen=True)
class Place:
    """Where a process runs: what its command line begins with, and the interface gloo uses (None: loopback)."""

    command: tuple[str, ...] = ()
    interface: str | None = None


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
        stall_seconds, progress: as `run_tasks`.
        places: of the processes, by rank: network namespaces, for a benchmark.

    Raises:
        SecureError: CrypTen is missing; as `run_tasks`.
    """
    require_crypten()
    ranks = range(PARTIES + (provider == "TTP"))

    def tasks(folder: Path) -> list[Task]:
        return [_task(rank, provider, places[rank], folder, job_list) for rank in ranks]

    images = sum(len(job.images) for job in job_list)
    return run_tasks(tasks, stall_seconds=stall_seconds, progress=progress, images=images)[:PARTIES]


def _task(rank: int, provider: jobs.Provider, place: Place, folder: Path, job_list: Sequence[jobs.Job]) -> Task:
    own = [job.view(rank) for job in job_list if rank < PARTIES]
    given = {"rank": rank, "provider": provider, "jobs": own}
    environment = _environment(rank, folder, place.interface)
    return Task(LABELS[rank], "deepshare.secure.baseline.party", given, environment=environment, command=place.command)


def _environment(rank: int, folder: Path, interface: str | None) -> dict[str, str]:
    """A fresh rendezvous, gloo kept on one interface."""
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(PARTIES),  # CrypTen adds the dealer, rank 2, by itself
        "RENDEZVOUS": f"file://{folder}/rendezvous",
        "DISTRIBUTED_BACKEND": "gloo",
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    chosen = interface or next(iter(loopback), None)
    return own if chosen is None else {**own, "GLOO_SOCKET_IFNAME": chosen}
