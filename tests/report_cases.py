"""Results that were never trained, for the report's tests: every field a real one has."""

import math
from dataclasses import replace
from pathlib import Path

from deepshare.reproduce.result import FORMAT, GateDimensions, Result, SiteAffine, SiteGates, write_result
from deepshare.reproduce.runs import content, load_with_counts
from deepshare.train.fields import build
from deepshare.train.provenance import Session

SESSION = build(
    Session,
    {
        "began": "2026-01-01T00:00:00Z",
        "first_epoch": 0,
        "versions": {"deepshare": "0.5", "torch": "2.13", "python": "3.11"},
        "machine": {"cpu": "a processor", "cores": 2, "threads": 1},
        "commit": "0123456789ab",
    },
)
SITES = [f"layer{stage}.{block}.relu{number}" for stage in (1, 2, 3, 4) for block in (0, 1) for number in (1, 2)]


def result(name: str, seed: int, accuracy: float, drelus: int) -> Result:
    """Of a packaged recipe, as if it had ended at `accuracy`."""
    recipe, counts = load_with_counts(name)
    kind = recipe.phase[-1].kind
    return Result(
        FORMAT,
        recipe.name,
        seed,
        content(recipe, counts),
        {**recipe.to_dict(), "seed": seed},
        artifacts={},
        sessions={kind: (SESSION,)},
        seconds={kind: 600.0},
        rows=({"phase": kind, "epoch": 1},),
        drelus=drelus,
        drelus_by_site={"all": drelus},
        test_accuracy=accuracy,
        test_accuracy_last=accuracy - 0.001,
    )


def gates() -> GateDimensions:
    """Real below shuffled, other at every position."""
    sites = {}
    for place, site in enumerate(SITES):
        real = tuple(0.3 + 0.05 * math.sin(place + position) for position in range(16))
        sites[site] = SiteGates(8, real, tuple(value + 0.4 for value in real))
    return GateDimensions(4096, sites)


def affine() -> dict[str, SiteAffine]:
    """Two prototypes at the first site of each stage, replicates on a circle."""
    found: dict[str, SiteAffine] = {}
    for place, site in enumerate(SITES):
        angles = [place + 0.3 * channel for channel in range(16)]
        leads = site.endswith("0.relu1")
        leader = None if leads else SITES[place - place % 4]
        alpha, beta = tuple(map(math.cos, angles)), tuple(map(math.sin, angles))
        found[site] = SiteAffine(alpha, beta, 2 if leads else 0, leader)
    return found


def write_results(folder: Path) -> Path:
    """Two rows of Table 1, one of Table 5, and demo runs that are for no row; one result is of a changed recipe."""
    for seed, accuracy in enumerate((0.7601, 0.7633, 0.7590)):
        write_result(folder, replace(result("deepshare-table1-6k", seed, accuracy, 6000), affine=affine()))
        write_result(folder, result("deepshare-table5-no-affine", seed, accuracy - 0.02, 6000))
    baseline = replace(result("deepshare-table1-baseline", 0, 0.7812, 491_520), gate_dimensions=gates())
    write_result(folder, baseline)
    for name, drelus in (("demo-relu", 7680), ("demo-240", 240)):
        for seed in (0, 1):
            write_result(folder, result(name, seed, 0.95 + seed / 100, drelus))
    write_result(folder, replace(result("demo-240", 2, 0.5, 240), content="0" * 16))
    return folder
