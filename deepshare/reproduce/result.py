"""A run's result as a file: results/<recipe>/seed-<n>.json (docs/reproduce.md says what each number means)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepshare.files import write_whole
from deepshare.reproduce.errors import ReproduceError, require
from deepshare.train import RecipeError
from deepshare.train.fields import build, plain
from deepshare.train.provenance import Session

FORMAT = 1


@dataclass(frozen=True)
class SiteAffine:
    """The trained alpha and beta of a shared site, per channel, to 6 significant digits.

    prototypes: the first so many channels gate themselves and the others; 0 where the gates are the site `leader`'s
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    prototypes: int
    leader: str | None = None

    def __post_init__(self) -> None:
        wanted = len(self.alpha) == len(self.beta) and 0 <= self.prototypes <= len(self.alpha)
        require(
            wanted and (self.prototypes == 0) == (self.leader is not None),
            f"wanted as many alpha as beta, and prototypes among them or a leader; got {len(self.alpha)} alpha, "
            f"{len(self.beta)} beta, {self.prototypes} prototypes, leader {self.leader!r}",
        )


@dataclass(frozen=True)
class SiteGates:
    """The effective dimension of a ReLU site's gates over its channels, at every position, in 0..1; shuffled beside."""

    channels: int
    real: tuple[float, ...]
    shuffled: tuple[float, ...]


@dataclass(frozen=True)
class GateDimensions:
    """What `analysis.effective_dimension` found in the final network on the first `images` test images, by site."""

    images: int
    sites: dict[str, SiteGates]


@dataclass(frozen=True)
class Result:
    """How one run of a recipe ended.

    recipe: as trained, every key resolved; content: of the recipe as it was asked for, whatever its name and seed
        (`runs.content`): results of equal content may be averaged
    artifacts: the key of each phase in the artifact store; sessions: the processes that trained it, in order (perhaps
        for another run, of which this one took it)
    seconds: of training per phase, evaluation not counted; rows: metrics of every epoch
    drelus: of the hard network, and by site
    test_accuracy, val_accuracy: of the epoch validation chose; _last: of the last epoch, the papers' practice (None
        where its weights were left out). Shares in [0, 1]; of validation None where that split is empty
    test_looks: how often the test split was measured, by the run's log: 1, or more where a kill came right after it
    affine: of shared plans, by shared site; gate_dimensions: of plans with every ReLU (DeepShare's Fig. 2)
    counts: the recipe that plan.counts_of named, cut after its masks
    """

    format: int
    name: str
    seed: int
    content: str
    recipe: dict[str, Any]
    artifacts: dict[str, str]
    sessions: dict[str, tuple[Session, ...]]
    seconds: dict[str, float]
    rows: tuple[dict[str, Any], ...]
    drelus: int
    drelus_by_site: dict[str, int]
    test_accuracy: float
    test_accuracy_last: float | None = None
    val_accuracy: float | None = None
    val_accuracy_last: float | None = None
    test_looks: int = 0
    affine: dict[str, SiteAffine] | None = None
    gate_dimensions: GateDimensions | None = None
    counts: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises ReproduceError naming the first field that does not fit the others."""
        for name in ("test_accuracy", "test_accuracy_last", "val_accuracy", "val_accuracy_last"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name}: wanted 0 to 1, got {value}")
        by_site = sum(self.drelus_by_site.values())
        require(self.drelus == by_site, f"drelus: wanted the sum of drelus_by_site, {by_site:,}, got {self.drelus:,}")
        phases = [str(row.get("phase")) for row in self.rows]
        wanted = ", ".join(sorted(set(phases)))
        require(set(phases) == self.seconds.keys(), f"seconds: wanted those of {wanted}, got {', '.join(self.seconds)}")
        ended = phases[-1:]
        got = ", ".join(self.sessions) or "none"
        require(set(ended) <= self.sessions.keys(), f"sessions: wanted those of {', '.join(ended)}, got {got}")
        self._check_recipe()

    def _check_recipe(self) -> None:
        """Whether the recipe has what tables name a network by."""
        for table, key in (("data", "name"), ("model", "name"), ("plan", "method")):
            values = self.recipe.get(table)
            got = values.get(key) if isinstance(values, dict) else None
            require(isinstance(got, str), f"recipe.{table}.{key}: wanted a string, got {got!r:.60}")
        limit = self.recipe["data"].get("limit")
        require(limit is None or type(limit) is int, f"recipe.data.limit: wanted an integer, got {limit!r:.60}")

    @property
    def session(self) -> Session | None:
        """The one that ended the last phase; None where nobody knows, as of a checkpoint that was given."""
        last = self.sessions[str(self.rows[-1].get("phase"))] if self.rows else ()
        return last[-1] if last else None


def result_path(results: Path, name: str, seed: int) -> Path:
    """Where the result of a recipe's run with this seed lies."""
    return results / name / f"seed-{seed}.json"


def write_result(results: Path, result: Result) -> Path:
    """Write `result` to its place under `results`, whole or not at all. Raises ReproduceError: its fields disagree."""
    result.check()
    path = result_path(results, result.name, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """The result in the file `path`.

    Raises ReproduceError naming the file, what was wanted and what came: it is damaged, of another format, or not what
    its path says. OSError if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(values, dict), f"wanted a result, got {values!r:.60}")
        got = values.get("format")
        require(got == FORMAT, f"format: wanted {FORMAT}, got {got!r:.60}{_newer(got)}")
        result = build(Result, values)
        result.check()
    except (ValueError, RecursionError, RecipeError, ReproduceError) as error:
        raise ReproduceError(f"{path}: {error}") from error
    wanted, ours = f"{path.parent.name}/{path.stem}", f"{result.name}/seed-{result.seed}"
    require(wanted == ours, f"{path}: wanted the result of {wanted}, got that of {ours}")
    return result


def _newer(got: object) -> str:
    return "; a newer deepshare wrote it" if isinstance(got, int) and got > FORMAT else ""


def read_results(results: Path, name: str | None = None) -> list[Result]:
    """Every result under `results`, or those of the recipe `name`, by name and seed; none without a folder.

    Raises ReproduceError: as `read_result`.
    """
    found = [read_result(path) for path in results.glob(f"{name or '*'}/seed-*.json")]
    return sorted(found, key=lambda result: (result.name, result.seed))


def six_digits(values: Sequence[float]) -> tuple[float, ...]:
    """Each value to 6 significant digits. Raises ReproduceError: one is not finite, which JSON cannot hold."""
    require(all(map(math.isfinite, values)), "alpha and beta: wanted finite numbers")
    return tuple(float(f"{value:.6g}") for value in values)
