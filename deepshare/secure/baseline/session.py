"""`secure.run`: a checkpoint's network, run between two parties on loopback."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from deepshare.secure.baseline import costs
from deepshare.secure.baseline.crypten_import import require_crypten
from deepshare.secure.baseline.jobs import Job, Provider, Weights
from deepshare.secure.baseline.launcher import run_jobs
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.lower import lower
from deepshare.secure.processes import STALL_SECONDS, Progress
from deepshare.secure.program import Program
from deepshare.secure.report import SecureReport, SiteCost

if TYPE_CHECKING:
    from deepshare.checkpoint import Checkpoint

PLAIN_BATCH = 256  # the plain run's batch, for memory only


def run(
    checkpoint: "str | Path | Checkpoint",
    images: Tensor,  # [N, C, H, W] float, normalised as in training
    labels: Tensor,  # [N] integer
    *,
    weights: Weights = "public",
    provider: Provider = "TFP",
    batch: int = 1,
    stall_seconds: float = STALL_SECONDS,
    name: str | None = None,
    progress: Progress | None = None,
) -> SecureReport:
    """Runs a checkpoint's network on `images` between a server (party 0, the model) and a client (party 1, the images).

    Two fresh processes on loopback, one core each, under CrypTen's protocols (semi-honest; docs/secure.md). Only the
    client learns the logits.

    Args:
        checkpoint: the file, or what `load_checkpoint` made of it.
        weights: "public": both parties know the weights, alpha and beta, linear layers are free. "secret": only the
            server does; the client's process is given shapes, channel maps and masks.
        provider: who makes the triples. "TFP": party 0 itself, a stand-in that knows them all. "TTP": a third process.
        batch: images per inference. Costs and seconds are those of one batch.
        stall_seconds: a party silent for half of that, or all without progress for as long, ends the run.
        name: of the network in the report; by default the file, of a loaded checkpoint the model's name.
        progress: called with (images done, images in all): first with none, last with all done. What it raises ends
            the run.

    Raises:
        SecureError: before any process starts, bad arguments, images of another size than the checkpoint's, an
            unsupported or soft layer; later, a party that dies or stalls.
        CheckpointError: the checkpoint is damaged.
    """
    from deepshare.checkpoint import Checkpoint, load_checkpoint  # here: the parties need no model code
    from deepshare.models import convention

    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    if name is None:
        name = loaded.spec["name"] if isinstance(checkpoint, Checkpoint) else str(checkpoint)
    if list(images.shape[1:]) != loaded.spec["input_size"]:
        wanted = loaded.spec["input_size"]
        raise SecureError(f"secure: images must be [N, *{wanted}], as {name} (got {list(images.shape)})")
    counted = convention(loaded.spec.get("stem_relu", False), loaded.spec["name"])
    settings: dict[str, Any] = {
        "weights": weights,
        "provider": provider,
        "batch": batch,
        "stall_seconds": stall_seconds,
    }
    return run_model(loaded.model, images, labels, name=name, convention=counted, progress=progress, **settings)


def run_model(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    name: str = "model",
    convention: str = "not stated",
    weights: Weights = "public",
    provider: Provider = "TFP",
    batch: int = 1,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress | None = None,
) -> SecureReport:
    """`run` for a model in memory; it is taken in eval mode and not changed.

    Args:
        convention: which ReLUs the network's name stands for (`models.convention`), for the report.
    """
    _check(images, labels, weights, provider, batch)
    require_crypten()
    images = images.detach().cpu()  # the parties compute on the CPU
    program, tensors = lower(model, (images.shape[1], images.shape[2], images.shape[3]))
    job = Job(program, tensors, encode(images, name="images"), weights, batch)
    plain = _plain_logits(model, images)
    (server,), (client,) = run_jobs([job], provider=provider, stall_seconds=stall_seconds, progress=progress)
    if server["spent"] != client["spent"]:
        raise SecureError("secure: the parties counted different rounds or bytes")
    names = {"network": name, "convention": convention, "provider": provider}
    return _report(names, job, client, server, plain, labels)


def _check(images: Tensor, labels: Tensor, weights: str, provider: str, batch: int) -> None:
    if weights not in get_args(Weights):
        raise SecureError(f"secure: weights must be 'public' or 'secret' (got {weights!r})")
    if provider not in get_args(Provider):
        raise SecureError(f"secure: provider must be 'TFP' or 'TTP' (got {provider!r})")
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise SecureError(
            f"secure: images must be a float tensor [N, C, H, W], normalised as in training, N >= 1 "
            f"(got {images.dtype} {list(images.shape)})"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise SecureError(f"secure: labels must be integers [{len(images)}] (got {labels.dtype} {list(labels.shape)})")
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= len(images):
        raise SecureError(f"secure: batch must be in 1..{len(images)}, the number of images (got {batch!r})")


def _plain_logits(model: nn.Module, images: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        logits = [model(part.to(device)).cpu() for part in images.split(PLAIN_BATCH)]
    model.train(was_training)
    return torch.cat(logits)


def _report(
    names: dict[str, str], job: Job, client: dict[str, Any], server: dict[str, Any], plain: Tensor, labels: Tensor
) -> SecureReport:
    predicted = costs.total(costs.predict(job.program, job.batch, secret=job.weights == "secret"))
    sites = _sites(job.program, client["spent"])
    exchanged, opened = sum(site.bytes_one_way for site in sites[:-1]), sites[-1].bytes_one_way
    full = [index for index, size in enumerate(client["sizes"]) if size == job.batch]
    secure_class, plain_class, truth = decode(client["logits"]).argmax(1), plain.argmax(1), labels.cpu()
    return SecureReport(
        **names,
        weights=job.weights,
        device="CPU, one core a party",
        transport="loopback, gloo",
        batch=job.batch,
        images=len(job.images),
        drelus=job.program.total_drelus,
        rounds=sum(site.rounds for site in sites),
        server_bytes=exchanged + opened,
        client_bytes=exchanged,
        dealer_bytes=server["dealt"][full[0]],
        predicted_rounds=predicted.rounds,
        predicted_bytes=predicted.comm_bytes,
        seconds_online=median(client["online"][index] for index in full),
        seconds_dealing=median(server["dealing"][index] for index in full),
        agreement=_share(secure_class == plain_class),
        accuracy_secure=_share(secure_class == truth),
        accuracy_plain=_share(plain_class == truth),
        sites=sites,
    )


def _sites(program: Program, spent: list[tuple[int, int]]) -> tuple[SiteCost, ...]:
    """Counters to rows. CrypTen counts sent plus received: half of it each way, but the opening goes one way only."""
    rows = [
        SiteCost(step.name, step.op, program.drelus(step), rounds, counted // 2)
        for step, (rounds, counted) in zip(program.steps, spent[:-1], strict=True)
    ]
    rounds, counted = spent[-1]
    return (*rows, SiteCost("logits to the client", "opening", 0, rounds, counted))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
