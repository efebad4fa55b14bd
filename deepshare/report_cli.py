"""`deepshare report` and `deepshare xor`: their options, and what they call."""

import argparse
import sys
from pathlib import Path


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add both commands to the subparsers of `deepshare`."""
    command = commands.add_parser("report", help="tables, figures and one page from the results")
    command.add_argument("--results", type=Path, default=Path("results"), help="of results (default %(default)s)")
    command.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default %(default)s)")
    command.set_defaults(run=_report)
    command = commands.add_parser("xor", help="the checkerboard with one gate (DeepShare, section 5), four networks")
    command.add_argument("--results", type=Path, default=Path("results"), help="of results (default %(default)s)")
    command.add_argument("--seeds", type=int, default=24, metavar="N", help="seeds 0 to N - 1 (default %(default)s)")
    command.add_argument("--epochs", type=int, default=5000, metavar="N", help="default %(default)s, the paper's")
    command.set_defaults(run=_xor)


def _report(options: argparse.Namespace) -> None:
    from deepshare.report import write_report

    print(f"written: {write_report(options.results, options.out)}")


def _xor(options: argparse.Namespace) -> None:
    from deepshare.report import write_xor

    path, found = write_xor(options.results, options.seeds, options.epochs, lambda line: print(line, file=sys.stderr))
    for method in found.methods:
        row = " ".join(f"{accuracy:.3f}" for accuracy in method.accuracies)
        print(f"{method.name:<32} solved {method.solved} of {len(found.seeds)}   {row}")
    print(f"written: {path}")
