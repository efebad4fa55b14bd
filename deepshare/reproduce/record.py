"""From a run's folder to its result: everything that is worth keeping of it."""

from dataclasses import replace

import torch
from torch import nn

from deepshare.analysis.effective_dimension import gate_dimensions
from deepshare.checkpoint import load_checkpoint
from deepshare.data import Dataset
from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan, count_drelus
from deepshare.reproduce.result import FORMAT, GateDimensions, Result, SiteAffine, SiteGates, six_digits
from deepshare.reproduce.runs import Run
from deepshare.train import TrainResult, load_recipe
from deepshare.train.run_folder import RunFolder

GATE_IMAGES = 4096  # as many as DeepShare's Fig. 2 takes
_TEST_LINE = " DReLUs, test "  # what `train` says whenever it has measured the test split


def trained_by(run: Run, ended: TrainResult) -> Result:
    """What a run's folder says of how it was trained and how it ended, without a look at its network."""
    folder, count = RunFolder(ended.run_dir), count_drelus(ended.plan)
    records = {phase.kind: folder.record(phase.kind) for phase in run.recipe.phase}
    log = ended.run_dir / "log.txt"
    last = ended.rows[-1]["val_accuracy"]
    return Result(
        FORMAT,
        run.name,
        run.recipe.seed,
        run.content,
        load_recipe(ended.run_dir / "recipe.toml").to_dict(),
        artifacts=dict(ended.artifacts),
        sessions={kind: record.sessions for kind, record in records.items() if record is not None},
        seconds=_seconds(ended),
        rows=tuple(dict(row) for row in ended.rows),
        drelus=count.total,
        drelus_by_site=dict(count.per_site),
        test_accuracy=ended.test_accuracy,
        test_accuracy_last=ended.test_accuracy_last,
        val_accuracy=ended.val_accuracy,
        val_accuracy_last=None if last is None else float(last),
        test_looks=log.read_text(encoding="utf-8").count(_TEST_LINE) if log.is_file() else 0,
        counts=None if run.counts is None else run.counts.recipe.to_dict(),
    )


def with_network(result: Result, ended: TrainResult, dataset: Dataset, device: torch.device) -> Result:
    """`result` with what is read off the final network: alpha and beta, or the dimension of all-ReLU gates."""
    network = load_checkpoint(ended.checkpoint)
    gates = None
    if all(site.kind == "relu" for site in network.plan):
        gates = gates_of(network.model.to(device), dataset)
    return replace(result, affine=affine_of(network.model, network.plan), gate_dimensions=gates)


def affine_of(model: nn.Module, plan: Plan) -> dict[str, SiteAffine] | None:
    """alpha and beta of every shared site of a trained network; None where the plan has none."""
    found = {}
    for site in plan:
        if site.kind == "shared":
            gate = model.get_submodule(site.name)
            assert isinstance(gate, SharedReLU2d)
            alpha, beta = (six_digits(value.detach().flatten().tolist()) for value in (gate.alpha, gate.beta))
            found[site.name] = SiteAffine(alpha, beta, site.prototypes or 0, site.leader)
    return found or None


def gates_of(model: nn.Module, dataset: Dataset) -> GateDimensions:
    """The effective dimension of every site's gates on the first GATE_IMAGES test images, or on all there are."""
    place = next(model.parameters()).device
    images = dataset.normalise(dataset.test.images[:GATE_IMAGES].to(place))
    sites = {}
    for one in gate_dimensions(model, images):
        values = one.to_dict()
        sites[one.site] = SiteGates(values["channels"], tuple(values["real"]), tuple(values["shuffled"]))
    return GateDimensions(len(images), sites)


def _seconds(ended: TrainResult) -> dict[str, float]:
    """Seconds of training by phase, of the epochs in its rows."""
    found: dict[str, float] = {}
    for row in ended.rows:
        kind = str(row["phase"])
        found[kind] = found.get(kind, 0.0) + float(row["seconds"] or 0)
    return {kind: round(value, 3) for kind, value in found.items()}
