"""One visit of a cell on CrypTen's operations: two fresh processes, provider TFP."""

import torch

from deepshare.secure.baseline.jobs import Job
from deepshare.secure.baseline.launcher import Place, run_jobs
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.lower import lower
from secure.cells import NotHereError, Visit
from secure.links import Link
from secure.networks import Network

PROVIDER = "TFP, a stand-in: party 0 makes all triples"
STALL_SECONDS = 120.0


def visit(network: Network, weights: str, link: Link, images: int) -> Visit:
    """Counts of one inference of batch 1, and seconds of `images` of them after one to warm up.

    Returns:
        online: seconds at the client, from its image to its logits, material dealt beforehand; dealing: median seconds
        party 0 took for that; preparing: seconds of work on the material before the image is there (none here);
        rounds, flights, path_bytes, server_bytes, client_bytes: counted, online; offline_bytes: what a party receives
        from a dealer (none: TFP's parties draw theirs from seeds); early_bytes: sent by the client before the image is
        there; setup_bytes: sent once a model version; worst_error: of the logits against the float model, beside
        logit_range.

    Raises:
        NotHereError: the link has TLS.
    """
    if link.tls:
        raise NotHereError("CrypTen has no TLS")
    model, drelus, plan = network.build()
    batch = network.images(images)
    program, tensors = lower(model, (3, network.family.side, network.family.side))
    job = Job(program, tensors, encode(batch), weights, 1)  # type: ignore[arg-type]
    with link.ends() as ends:
        places = [Place(end.command, end.interface) for end in ends]
        (server,), (client,) = run_jobs([job], places=places, stall_seconds=STALL_SECONDS)
    with torch.no_grad():
        expected = model(batch).double()
    exchanged = sum(counted for _, counted in client["spent"][:-1]) // 2
    return {
        "online": client["online"],
        "dealing": sorted(server["dealing"])[len(server["dealing"]) // 2],
        "preparing": 0.0,
        "rounds": sum(rounds for rounds, _ in client["spent"]),
        "flights": sum(rounds for rounds, _ in client["spent"]),
        "path_bytes": exchanged + client["spent"][-1][1],
        "server_bytes": exchanged + client["spent"][-1][1],
        "client_bytes": exchanged,
        "early_bytes": 0,
        "offline_bytes": [0, 0],
        "setup_bytes": 0,
        "drelus": drelus,
        "plan": plan,
        "provider": PROVIDER,
        "device": "CPU, one core a party",
        "batch": 1,
        "worst_error": float((decode(client["logits"]) - expected).abs().max()),
        "logit_range": float(expected.abs().max()),
    }
