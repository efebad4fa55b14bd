"""`deepshare secure serve` and `query`: from the command line's options to the parties of deepshare.secure.net."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepshare.checkpoint import Checkpoint
    from deepshare.data import Dataset
    from deepshare.secure.engine.protocol import Protocol
    from deepshare.secure.net.query import Answer
    from deepshare.secure.net.serve import Pixels
    from deepshare.secure.net.session import Session


def serve(options: argparse.Namespace) -> None:
    from deepshare.files import write_whole
    from deepshare.secure.net.guard import forbid_dealer

    if options.describe is not None:
        protocol, _, _ = _network(options)
        write_whole(options.describe, protocol.to_json())
        print(f"{options.describe}: protocol {protocol.digest[:12]}, no weight is in it")
        return
    forbid_dealer()
    _serve_network(options)


def _serve_network(options: argparse.Namespace) -> None:
    from deepshare.secure import SecureError
    from deepshare.secure.engine.party import Server
    from deepshare.secure.net.connect import Address
    from deepshare.secure.net.keys import Identity
    from deepshare.secure.net.log import log
    from deepshare.secure.net.serve import Service
    from deepshare.secure.net.supply import server_supply

    listen = Address.parse("--listen", needed("serve", "--listen", options.listen))
    identity = Identity.load(needed("serve", "--keys", options.keys), "server")
    if options.queries is not None and options.queries < 1:
        raise SecureError(f"secure serve: --queries must be at least 1 (got {options.queries})")
    protocol, tensors, pixels = _network(options)
    supply, mask_key = server_supply(identity, protocol, tensors, _dealer(options), options.material)
    try:
        service = Service(
            Server(protocol, tensors, mask_key),
            supply,
            pixels(),
            listen=listen,
            identity=identity,
            queue=options.queue,
            log=log,
            ready=lambda address: print(f"ready: {address}", flush=True),
        )
        service.run(options.queries)
    finally:
        supply.close("it ended")
    if service.failures:
        raise SecureError(service.failures[-1])


def _network(options: argparse.Namespace) -> tuple["Protocol", dict[str, Any], Any]:
    """(protocol, integer weights, what gives the Pixels) of --model under the settings."""
    from deepshare.checkpoint import load_checkpoint
    from deepshare.secure.calibrate import Ranges
    from deepshare.secure.engine.choose import WIRES, settle
    from deepshare.secure.engine.protocol import Protocol, Settings
    from deepshare.secure.label import with_label
    from deepshare.secure.lower import lower

    settings = Settings(options.weights, options.affine, gate_bits=options.gate_bits, batch=options.batch)
    checkpoint = load_checkpoint(options.model)
    channels, height, width = checkpoint.spec["input_size"]
    program, tensors = lower(checkpoint.model, (channels, height, width))
    if settings.gate_bits == 32:
        Ranges.load(needed("serve", "--ranges", options.ranges)).check(32, program, tensors)
    if options.reveal == "label":
        program = with_label(program)
    settings = settle(program, settings, options.gate, WIRES[options.link])
    return Protocol.compile(program, settings), tensors, lambda: _pixels(checkpoint, options)


def _pixels(checkpoint: "Checkpoint", options: argparse.Namespace) -> "Pixels":
    """--mean and --std, or those of the data the checkpoint was trained on."""
    from deepshare.secure import SecureError
    from deepshare.secure.net.serve import Pixels

    channels, height, width = checkpoint.spec["input_size"]
    if (options.mean is None) != (options.std is None):
        raise SecureError("secure serve: --mean and --std go together")
    if options.mean is not None:
        mean, std = (_floats(flag, getattr(options, flag), channels) for flag in ("mean", "std"))
        if min(std) <= 0:
            raise SecureError(f"secure serve: --std must be above 0 (got {options.std})")
    else:
        dataset = data_set(checkpoint, None, options.data_root, "--mean and --std are needed")
        mean, std = dataset.mean, dataset.std
    return Pixels((channels, height, width), mean, std)


def _floats(flag: str, text: str, count: int) -> tuple[float, ...]:
    from deepshare.secure import SecureError

    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(abs(value) < 1e6 for value in values):
        raise SecureError(f"secure serve: --{flag} must be {count} numbers with commas between (got {text!r:.80})")
    return values


def query(options: argparse.Namespace) -> None:
    from deepshare.secure.net.connect import Address
    from deepshare.secure.net.guard import forbid_dealer
    from deepshare.secure.net.images import read_images
    from deepshare.secure.net.keys import Identity
    from deepshare.secure.net.log import log
    from deepshare.secure.net.session import last_words, open_session

    forbid_dealer()
    identity = Identity.load(needed("query", "--keys", options.keys), "client")
    for path in options.images:
        read_images(path, 3)  # what cannot be read is said before anybody waits; how many channels the server will say
    address = Address.parse("--connect", options.connect)
    session = open_session(address, identity, "server", on_note=_Places(log))
    why = "it was stopped"
    try:
        _ask(options, identity, session, log)
        why = ""
    except Exception as error:
        why = last_words(error)
        raise
    finally:
        session.close(why)


class _Places:
    """Says the client's place in the queue when it changes."""

    def __init__(self, log: Any) -> None:
        self._log, self._place = log, 0

    def __call__(self, note: dict[str, Any]) -> None:
        place = note.get("place", 0)
        if type(place) is int and place > 0 and place != self._place:
            self._log(f"waiting: place {place}")
            self._place = place


def _ask(options: argparse.Namespace, identity: Any, session: "Session", log: Any) -> None:
    import torch

    from deepshare.secure import SecureError
    from deepshare.secure.engine.party import Client
    from deepshare.secure.net.images import prepare_images, read_images
    from deepshare.secure.net.query import ask, client_supply, default_cache, receive_weights, receive_welcome

    welcome = receive_welcome(session)
    pixels = [read_images(path, welcome.size[0]) for path in options.images]
    pairs = zip(pixels, options.images, strict=True)
    if options.logits and welcome.protocol.program.reveals == "label":
        raise SecureError("secure query: --logits: this server reveals the label alone")
    images = [prepare_images(part, welcome.size, welcome.mean, welcome.std, str(path)) for part, path in pairs]
    supply = client_supply(identity, welcome, _dealer(options), options.material)
    why = "it gave up"
    try:
        given = receive_weights(session, welcome, options.cache or default_cache())
        answer = ask(session, supply, Client(welcome.protocol, given), torch.cat(images), log)
        why = ""
    finally:
        supply.close(why)
    names = [
        str(path) if len(part) == 1 else f"{path}[{index}]"
        for path, part in zip(options.images, pixels, strict=True)
        for index in range(len(part))
    ]
    _print_answer(names, answer, logits=options.logits)


def _print_answer(names: list[str], answer: "Answer", *, logits: bool) -> None:
    for index, (name, label) in enumerate(zip(names, answer.labels.tolist(), strict=True)):
        row = answer.logits[index].flatten().tolist() if logits and answer.logits is not None else []
        print(" ".join([f"{name}: {label}", *(f"{value:.4f}" for value in row)]))
    print(
        f"{answer.inferences} inferences: {answer.rounds} rounds, {answer.sent:,} bytes sent, "
        f"{answer.received:,} received online; seconds {answer.seconds_offline:.3f} offline, "
        f"{answer.seconds_online:.3f} online"
    )


def needed(action: str, flag: str, value: Any) -> Any:
    from deepshare.secure import SecureError

    if value is None:
        raise SecureError(f"secure {action}: {flag} is needed")
    return value


def _dealer(options: argparse.Namespace) -> Any:
    from deepshare.secure.net.connect import Address

    return None if options.dealer is None else Address.parse("--dealer", options.dealer)


def data_set(checkpoint: "Checkpoint", name: str | None, root: Path | None, otherwise: str) -> "Dataset":
    """The data set of that name, or the one the checkpoint's recipe names; `otherwise` is what to do without."""
    from deepshare import data
    from deepshare.secure import SecureError

    trained_on = (checkpoint.recipe or {}).get("data")
    name = name or (trained_on.get("name") if isinstance(trained_on, dict) else None)
    if not isinstance(name, str):
        raise SecureError(f"secure: {otherwise}: the checkpoint does not say what it was trained on")
    return data.load(name, root)
