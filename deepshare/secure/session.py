"""`secure.run`: a network between a server and a client on this machine, by the engine or by the baseline."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from deepshare.secure.calibrate import Ranges, calibrate
from deepshare.secure.engine import costs
from deepshare.secure.engine.choose import LAN, Wire, settle
from deepshare.secure.engine.protocol import Gate, Protocol, Secrecy, Settings
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.local import TRANSPORT, Measured, run_engine
from deepshare.secure.lower import lower
from deepshare.secure.processes import STALL_SECONDS, Progress
from deepshare.secure.report import SecureReport, SiteCost
from deepshare.secure.request import agreement, check_choice, check_images, open_checkpoint, plain_logits

if TYPE_CHECKING:
    from deepshare.checkpoint import Checkpoint

Engine = Literal["deepshare", "crypten"]


def run(
    checkpoint: "str | Path | Checkpoint",
    images: Tensor,  # [N, C, H, W] float, normalised as in training
    labels: Tensor,  # [N] integer
    *,
    name: str | None = None,
    **settings: Any,
) -> SecureReport:
    """Runs a checkpoint's network on `images` between a server (party 0, the model) and a client (party 1, the images).

    Fresh processes on this machine, one core each, the dealer in one of its own (semi-honest; docs/secure.md). Only the
    client learns the logits.

    Args:
        checkpoint: the file, or what `load_checkpoint` made of it.
        name: of the network in the report; by default the file, of a loaded checkpoint the model's name.
        settings: as `run_model`'s.

    Raises:
        SecureError: before any process starts, bad arguments, images of another size than the checkpoint's, an
            unsupported or soft layer; later, a process that dies or stalls.
        CheckpointError: the checkpoint is damaged.
    """
    model, names = open_checkpoint(checkpoint, images, name)
    return run_model(model, images, labels, **names, **settings)


def run_model(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    name: str = "model",
    convention: str = "not stated",
    engine: Engine = "deepshare",
    weights: Secrecy = "secret",
    affine: Secrecy | None = None,
    gate: Gate | Literal["auto"] = "auto",
    wire: Wire = LAN,
    gate_bits: int = 64,
    ranges: Ranges | None = None,
    provider: str = "TFP",
    batch: int = 1,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress | None = None,
) -> SecureReport:
    """`run` for a model in memory; it is taken in eval mode and not changed.

    Args:
        convention: which ReLUs the network's name stands for (`models.convention`), for the report.
        engine: "deepshare": docs/engine.md. "crypten": the baseline, docs/baseline.md.
        weights: "secret": only the server knows them; the client's process is given shapes, channel maps and masks.
            "public": both parties know the weights, alpha and beta.
        affine, gate, gate_bits: of the engine (`Settings`); gate "auto": `choose_gate` for a link like `wire`.
        ranges: what `calibrate` measured on this network; 32-bit gates are refused where they do not allow them. None:
            they are measured on these images.
        provider: of the baseline's triples, "TFP" or "TTP".
        batch: images per inference. Costs and seconds are those of one batch.
        stall_seconds: a process silent, or all without progress, for that long ends the run.
        progress: called with (images done, images in all): first with none, last with all done. What it raises ends
            the run.
    """
    check_choice("engine", engine, ("deepshare", "crypten"))
    if engine == "crypten":
        from deepshare.secure.baseline import session

        given = {"weights": weights, "provider": provider, "batch": batch, "stall_seconds": stall_seconds}
        named = {"name": name, "convention": convention}
        return session.run_model(model, images, labels, progress=progress, **named, **given)  # type: ignore[arg-type]
    check_images(images, labels, batch)
    settings = Settings(weights, affine, gate_bits=gate_bits, batch=batch)
    images = images.detach().cpu()
    program, tensors = lower(model, (images.shape[1], images.shape[2], images.shape[3]))
    protocol = Protocol.compile(program, settle(program, settings, gate, wire))
    encoded = encode(images, name="images")
    if gate_bits == 32:
        (ranges or calibrate(program, tensors, encoded)).check(32, program, tensors)
    plain = plain_logits(model, images).argmax(1)
    measured = run_engine(protocol, tensors, encoded, stall_seconds=stall_seconds, progress=progress)
    agreed = agreement(decode(measured.logits).argmax(1), plain, labels)
    return _report({"network": name, "convention": convention}, protocol, measured, len(images), agreed)


def _report(
    names: dict[str, Any], protocol: Protocol, measured: Measured, images: int, agreed: dict[str, Any]
) -> SecureReport:
    settings, predicted = protocol.settings, costs.total(protocol)
    server, client = measured.server, measured.client
    sites = _sites(protocol, measured)
    sent = [sum(int(row[1]) for row in party["spent"][0]) for party in (server, client)]
    preparing = (max(pair) for pair in zip(server["preparing"], client["preparing"], strict=True))
    return SecureReport(
        **names,
        engine=f"deepshare, gates by {settings.gate}, {settings.gate_bits} bits",
        weights=settings.weights,
        provider="dealer",
        device="CPU, one core a party",
        transport=TRANSPORT,
        batch=settings.batch,
        images=images,
        drelus=protocol.program.total_drelus,
        rounds=sum(site.rounds for site in sites),
        flights=costs.flights(protocol),
        server_bytes=sent[0],
        client_bytes=sent[1],
        early_bytes=client["early"],
        dealer_bytes=protocol.body_bytes(0) + protocol.body_bytes(1),
        setup_bytes=server["setup"],
        predicted_rounds=predicted.rounds,
        predicted_bytes=predicted.server_sends + predicted.client_sends,
        seconds_online=median(client["online"]),
        seconds_preparing=median(preparing),
        seconds_dealing=median(measured.dealing),
        **agreed,
        sites=sites,
    )


def _sites(protocol: Protocol, measured: Measured) -> tuple[SiteCost, ...]:
    """Counted rounds and bytes, predicted bytes of material, median seconds at the client."""
    steps = protocol.program.steps
    rows = []
    for index, cost in enumerate(costs.by_step(protocol)):
        name, op = (steps[index].name, steps[index].op) if index < len(steps) else ("logits to the client", "opening")
        drelus = protocol.program.drelus(steps[index]) if index < len(steps) else 0
        at_server, at_client = (party["spent"][0][index] for party in (measured.server, measured.client))
        seconds, waited = (median(one[index][column] for one in measured.client["spent"]) for column in (2, 3))
        sent = max(int(at_server[1]), int(at_client[1]))
        dealt = cost.dealt_server + cost.dealt_client
        rounds = max(int(at_server[0]), int(at_client[0]))
        rows.append(SiteCost(name, op, drelus, rounds, sent, dealt, seconds, waited))
    return tuple(rows)
