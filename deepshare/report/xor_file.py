"""results/xor.json: the networks of `analysis.xor`, with where they were trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deepshare.analysis import xor
from deepshare.files import write_whole
from deepshare.report.errors import ReportError
from deepshare.train import RecipeError
from deepshare.train.fields import build, plain
from deepshare.train.provenance import Session, this_session

FORMAT = 1
NAME = "xor.json"


@dataclass(frozen=True)
class XorFile:
    """session: the process that trained them."""

    format: int
    session: Session
    xor: xor.Measured


def write_xor(
    results: Path, seeds: int, epochs: int = xor.EPOCHS, say: Callable[[str], None] | None = None
) -> tuple[Path, xor.Measured]:
    """Train the networks with seeds 0 to `seeds` - 1 and write results/xor.json, whole.

    Raises ReportError: seeds or epochs are no counts. OSError: the folder cannot be written.
    """
    for name, count in (("--seeds", seeds), ("--epochs", epochs)):
        if not 1 <= count <= 100_000:
            raise ReportError(f"xor: {name} must be 1 to 100,000 (got {count})")
    results.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors hold some hundred numbers
    try:
        session = this_session(torch.device("cpu"), 1)
        measured = xor.measure(range(seeds), epochs, say=say)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps(plain(XorFile(FORMAT, session, measured)), allow_nan=False) + "\n"
    return write_whole(results / NAME, text), measured


def read_xor(results: Path) -> XorFile | None:
    """What `write_xor` wrote under `results`; None if it is not there. Raises ReportError: it is damaged."""
    path = results / NAME
    if not path.is_file():
        return None
    try:
        found = build(XorFile, json.loads(path.read_text(encoding="utf-8")))
        found.xor.check()
    except (ValueError, TypeError, RecursionError, RecipeError) as error:
        raise ReportError(f"{path}: wanted what `deepshare xor` writes, got {type(error).__name__}: {error}") from error
    if found.format != FORMAT:
        raise ReportError(f"{path}: format: wanted {FORMAT}, got {found.format}")
    return found
