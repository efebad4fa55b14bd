#!/usr/bin/env python3
"""Private ReLU of other libraries beside ours, in processes of their own on loopback: `make bench-peers`.

    bench/peers/run.py [--out FOLDER] [--elements 65536 1048576] [--repeats 5] [--bound 300] [--only crypten spu-semi2k]

Each peer runs in .venv-peers/<package>, made here from its package by name. Each run has a network namespace of its own
where the user is root, so that its loopback counter is the peer's alone. Writes peers.json and peers.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]

import engine_deal  # noqa: E402
from secure import machine, namespaces  # noqa: E402

from deepshare.files import write_whole  # noqa: E402
from deepshare.text_table import markdown  # noqa: E402

VENVS = ROOT / ".venv-peers"
FIRST_PORT = 27100
KILL_SECONDS = 5.0
Record = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A library and protocol.

    Attributes:
        script: its party, a file beside this one.
        packages: what pip installs into its environment; none: it runs in the environment of this process.
        material: who makes the correlated randomness, and whether the seconds include it.
        dealt: tickets are made beforehand, by this process (engine_deal.py).
    """

    name: str
    script: str
    packages: tuple[str, ...]
    setting: str
    parties: int
    material: str
    dealt: bool = False


OURS = "our dealer, beforehand; not included"
PEERS = (
    Peer("engine-tree-64", "engine_relu.py", (), "tree-64", 2, OURS, dealt=True),
    Peer("engine-tree-32", "engine_relu.py", (), "tree-32", 2, OURS, dealt=True),
    Peer("engine-dcf-64", "engine_relu.py", (), "dcf-64", 2, OURS, dealt=True),
    Peer("crypten", "crypten_relu.py", (), "", 2, "TFP: party 0 makes it and knows it all; included"),
    Peer("spu-semi2k", "spu_relu.py", ("spu",), "SEMI2K", 2, "trusted first party; included"),
    Peer("spu-cheetah", "spu_relu.py", ("spu",), "CHEETAH", 2, "none needed: oblivious transfer; included"),
    Peer("mpyc", "mpyc_relu.py", ("mpyc", "numpy", "gmpy2"), "", 3, "none needed: three parties, honest majority"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-peers")
    parser.add_argument("--elements", type=int, nargs="+", default=[65_536, 1_048_576])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--bound", type=float, default=300.0, help="seconds a peer may take for one size, with its start"
    )
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], default=[p.name for p in PEERS])
    return parser.parse_args()


def interpreter(peer: Peer) -> str:
    """Python of the peer's environment, made if it is missing.

    Raises:
        RuntimeError: pip failed; the message is the last line it wrote.
    """
    if not peer.packages:
        return sys.executable
    folder = VENVS / peer.packages[0]
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        print(f"installing {' '.join(peer.packages)} into {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
        installed = subprocess.run(pip, capture_output=True, text=True, check=False)
        if installed.returncode:
            words = installed.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"pip install {' '.join(peer.packages)}: {words[-1]}")
        done.touch()
    return str(python)


@contextmanager
def own_loopback() -> Iterator[tuple[str, ...]]:
    """What a command begins with to have a loopback interface to itself; nothing where that is not possible."""
    try:
        namespaces.require()
    except namespaces.MissingError:
        yield ()
        return
    with namespaces.hosts(("peer",), None) as made:
        yield made["peer"].command


def run(peer: Peer, elements: int, options: argparse.Namespace) -> Record:
    """One peer at one size; `failed` says why there is no result."""
    record: Record = {"peer": peer.name, "elements": elements, "parties": peer.parties, "material": peer.material}
    record["load_before"] = os.getloadavg()[0]
    try:
        python = interpreter(peer)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return record | {"failed": f"not installed: {error}"}
    folder = Path(tempfile.mkdtemp(prefix="deepshare-peers-"))
    try:
        if peer.dealt:
            record |= engine_deal.deal(folder, elements, peer.setting, options.repeats + 1)
        with own_loopback() as prefix:
            record["loopback_is_its_own"] = bool(prefix)
            failed = _processes(peer, [*prefix, python, str(HERE / peer.script)], elements, folder, options)
        return record | ({"failed": failed} if failed else _result(peer, elements, folder))
    except engine_deal.TooLargeError as error:
        return record | {"failed": f"not run: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _processes(peer: Peer, command: list[str], elements: int, folder: Path, options: argparse.Namespace) -> str | None:
    """Runs the parties; None if all ended well within the bound, else why not."""
    settings = ["--parties", peer.parties, "--port", FIRST_PORT, "--elements", elements]
    settings += ["--repeats", options.repeats, "--setting", peer.setting, "--folder", folder]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE.parent}",
    }
    processes = []
    for rank in range(peer.parties):
        with (folder / f"output{rank}").open("wb") as output:
            party = [*command, "--rank", str(rank), *map(str, settings)]
            processes.append(subprocess.Popen(party, stdout=output, stderr=output, env=environment))
    try:
        return _watch(processes, folder, options.bound)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _watch(processes: list[subprocess.Popen[bytes]], folder: Path, bound: float) -> str | None:
    deadline = time.monotonic() + bound
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return f"no result in {bound:g} s"
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + KILL_SECONDS)
        time.sleep(0.1)
    bad = [rank for rank, process in enumerate(processes) if process.returncode]
    if not bad:
        return None
    words = (folder / f"output{bad[0]}").read_text(errors="replace").strip().splitlines()
    return f"party {bad[0]} ended with {processes[bad[0]].returncode}: {words[-1] if words else 'no output'}"


def _result(peer: Peer, elements: int, folder: Path) -> Record:
    """A repeat's seconds are those of its slowest party; bytes are party 0's reading of the whole loopback."""
    parties = [json.loads((folder / f"party{rank}.json").read_text()) for rank in range(peer.parties)]
    slowest = [max(times) for times in zip(*(party["seconds"] for party in parties), strict=True)]
    kept = {key: parties[0][key] for key in ("rounds", "counted_bytes", "threshold", "warm") if key in parties[0]}
    return {
        **kept,
        "seconds": slowest,
        "loopback_bytes_per_element": median(parties[0]["loopback_bytes"]) / elements,
        "wrong": max(party["wrong"] for party in parties),
        "worst_error": max(party["worst_error"] for party in parties),
        "versions": parties[0]["versions"],
    }


def table(records: list[Record]) -> str:
    header = (
        "peer",
        "elements",
        "seconds, median",
        "least - most",
        "runs",
        "B/element on the wire",
        "counted by it",
        "dealt B/element",
    )
    return markdown((*header, "rounds", "wrong", "parties", "material"), [_cells(record) for record in records])


def _cells(record: Record) -> tuple[str, ...]:
    start = (record["peer"], f"{record['elements']:,}")
    if "failed" in record:
        return (*start, record["failed"], *("-",) * 7, str(record["parties"]), record["material"])
    seconds, counted = record["seconds"], record.get("counted_bytes")
    return (
        *start,
        f"{median(seconds):.3g}",
        f"{min(seconds):.3g} - {max(seconds):.3g}",
        f"{len(seconds)}" if record["warm"] else "1, the first",
        f"{record['loopback_bytes_per_element']:.1f}",
        "-" if counted is None else f"{counted / record['elements']:.1f}",
        f"{record['dealt_bytes'] / record['elements']:.1f}" if "dealt_bytes" in record else "-",
        str(record.get("rounds", "-")),
        str(record["wrong"]),
        str(record["parties"]),
        record["material"],
    )


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for elements in options.elements:
        for peer in PEERS:
            if peer.name in options.only:
                records.append(run(peer, elements, options))
                print(" ".join(_cells(records[-1])[:6]), flush=True)
                report = {"machine": machine.describe(), "bound": options.bound, "records": records}
                write_whole(options.out / "peers.json", json.dumps(report, indent=1) + "\n")
    text = f"{machine.line()}\n\n{table(records)}\n"
    write_whole(options.out / "peers.md", text)
    print(text)


if __name__ == "__main__":
    main()
