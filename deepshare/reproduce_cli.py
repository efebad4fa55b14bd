"""`deepshare reproduce`: its options, and what they call."""

import argparse
import sys
from pathlib import Path

from deepshare.arguments import ArgumentError, ints

MOST_SEEDS = 1000


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the command to the subparsers of `deepshare`."""
    command = commands.add_parser("reproduce", help="the papers' numbers: recipes, seeds and what they need first")
    command.add_argument("names", nargs="*", metavar="NAME", help="recipes' names (see --list) or TOML files")
    command.add_argument("--list", action="store_true", help="what the papers have beside what was reached, and stop")
    seeds = command.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default 1)")
    seeds.add_argument("--seed", metavar="N,N,...", help="these seeds")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default %(default)s)")
    command.add_argument("--max-minutes", type=float, metavar="M", help="stop in time, exit status 75; call again")
    command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default %(default)s)")
    command.add_argument("--results", type=Path, default=Path("results"), help="of results (default %(default)s)")
    command.add_argument("--data-root", type=Path, help="folder of the official data files")
    command.add_argument("--device", help="default: the first CUDA device, else the CPU")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe")
    command.set_defaults(run=_reproduce)


def _reproduce(options: argparse.Namespace) -> int:
    from deepshare.reproduce import listing, reproduce
    from deepshare.train.distributed import joined

    if options.list:
        print(listing(options.results, options.names or None))
        return 0
    if not options.names:
        raise ArgumentError("NAME is missing: recipes' names (see --list) or TOML files")
    seeds = _seeds(options.seeds, options.seed)
    with joined(options.device) as ranks:
        ended = reproduce(
            options.names,
            seeds=seeds,
            runs=options.runs,
            results=options.results,
            data_root=options.data_root,
            device=options.device,
            jobs=options.jobs,
            max_minutes=options.max_minutes,
            overrides=options.set,
            say=_say,
        )
        if ranks.is_writer:
            _say(f"\n{ended}")
    return ended.status


def _say(line: str) -> None:
    """Print a line; the status is of the runs, whether or not somebody still listens."""
    from deepshare.train.progress import show

    show(f"{line}\n", sys.stdout)


def _seeds(count: int | None, text: str | None) -> tuple[int, ...]:
    """0 to count - 1, or the seeds in `text`. Raises ArgumentError."""
    if text is not None:
        return ints("--seed", text, digits=19)
    if count is not None and not 0 < count <= MOST_SEEDS:
        raise ArgumentError(f"--seeds must be 1 to {MOST_SEEDS} (got {count})")
    return tuple(range(count or 1))
