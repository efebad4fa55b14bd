"""Networks on CrypTen's own operations, between two parties on loopback: the yardstick."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

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
from deepshare.secure.request import agreement, check_choice, check_images, open_checkpoint, plain_logits

if TYPE_CHECKING:
    from deepshare.checkpoint import Checkpoint

ENGINE = "CrypTen 0.4.1's operations"


def run(
    checkpoint: "str | Path | Checkpoint", images: Tensor, labels: Tensor, *, name: str | None = None, **settings: Any
) -> SecureReport:
    """`run_model` for a checkpoint's network; arguments as `deepshare.secure.run`'s."""
    model, names = open_checkpoint(checkpoint, images, name)
    return run_model(model, images, labels, **names, **settings)


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
    """Runs `model` on `images` between a server and a client: two fresh processes, one core each, over gloo.

    Only the client learns the logits. The model is taken in eval mode and not changed.

    Args:
        images: [N, C, H, W] float, normalised as in training; labels: [N] integer.
        convention: which ReLUs the network's name stands for (`models.convention`), for the report.
        weights: "public": both parties know the weights, alpha and beta, linear layers are free. "secret": only the
            server does; the client's process is given shapes, channel maps and masks.
        provider: who makes the triples. "TFP": party 0 itself, a stand-in that knows them all. "TTP": a third process.
        batch: images per inference. Costs and seconds are those of one batch.
        stall_seconds: a party silent for half of that, or all without progress for as long, ends the run.
        progress: called with (images done, images in all): first with none, last with all done. What it raises ends
            the run.

    Raises:
        SecureError: before any process starts, bad arguments, an unsupported or soft layer; later, a party that dies or
            stalls.
    """
    check_choice("weights", weights, get_args(Weights))
    check_choice("provider", provider, get_args(Provider))
    check_images(images, labels, batch)
    require_crypten()
    images = images.detach().cpu()  # the parties compute on the CPU
    program, tensors = lower(model, (images.shape[1], images.shape[2], images.shape[3]))
    job = Job(program, tensors, encode(images, name="images"), weights, batch)
    plain = plain_logits(model, images)
    (server,), (client,) = run_jobs([job], provider=provider, stall_seconds=stall_seconds, progress=progress)
    if server["spent"] != client["spent"]:
        raise SecureError("secure: the parties counted different rounds or bytes")
    names = {"network": name, "convention": convention, "provider": provider}
    return _report(names, job, client, server, plain, labels)


def _report(
    names: dict[str, Any], job: Job, client: dict[str, Any], server: dict[str, Any], plain: Tensor, labels: Tensor
) -> SecureReport:
    predicted = costs.total(costs.predict(job.program, job.batch, secret=job.weights == "secret"))
    sites = _sites(job.program, client["spent"])
    exchanged, opened = sum(site.bytes_one_way for site in sites[:-1]), sites[-1].bytes_one_way
    full = [index for index, size in enumerate(client["sizes"]) if size == job.batch]
    agreed = agreement(decode(client["logits"]).argmax(1), plain.argmax(1), labels)
    return SecureReport(
        **names,
        engine=ENGINE,
        weights=job.weights,
        device="CPU, one core a party",
        transport="loopback, gloo",
        batch=job.batch,
        images=len(job.images),
        drelus=job.program.total_drelus,
        rounds=sum(site.rounds for site in sites),
        flights=sum(site.rounds for site in sites),
        server_bytes=exchanged + opened,
        client_bytes=exchanged,
        early_bytes=0,
        dealer_bytes=server["dealt"][full[0]],
        setup_bytes=0,
        predicted_rounds=predicted.rounds,
        predicted_bytes=predicted.comm_bytes,
        seconds_online=median(client["online"][index] for index in full),
        seconds_preparing=0.0,
        seconds_dealing=median(server["dealing"][index] for index in full),
        **agreed,
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
