"""`deepshare secure run | calibrate | keys | deal | serve | query`: two-party inference, here and between machines."""

import argparse
import sys
from pathlib import Path

from deepshare.secure_party_cli import data_set, needed, query, serve


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Adds the group `secure` to the command line's parser."""
    group = commands.add_parser("secure", help="two-party inference: on this machine (run), or between machines")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    for add_action in (_add_run, _add_calibrate, _add_keys, _add_deal, _add_serve, _add_query):
        add_action(actions)


def _add_run(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("run", help="run a checkpoint between two parties, on this machine")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--engine", choices=("deepshare", "crypten"), default="deepshare", help="default %(default)s")
    command.add_argument(
        "--provider", choices=("TFP", "TTP"), default="TFP", help="of CrypTen's triples (default %(default)s)"
    )
    _add_engine_settings(command)
    command.add_argument("--images", type=int, default=20, metavar="N", help="test images (default %(default)s)")
    command.add_argument("--data", help="data set (default: the one the checkpoint was trained on)")
    command.add_argument("--data-root", type=Path, help="folder of the official data files")
    command.add_argument("--json", type=Path, help="also write the report to this file")
    command.set_defaults(run=_run)


def _add_calibrate(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("calibrate", help="how large a network's values grow: whether 32-bit gates are safe")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--images", type=int, default=100, metavar="N", help="training images (default %(default)s)")
    command.add_argument("--data", help="data set (default: the one the checkpoint was trained on)")
    command.add_argument("--data-root", type=Path, help="folder of the official data files")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the ranges there, for 'serve --ranges'")
    command.set_defaults(run=_calibrate)


def _add_keys(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("keys", help="make keys and certificates, a folder for each party")
    command.add_argument("folder", type=Path, help="must not exist, or be empty")
    command.add_argument("--clients", type=int, default=1, metavar="N", help="default %(default)s")
    command.add_argument("--days", type=int, default=365, help="until the certificates expire (default %(default)s)")
    command.set_defaults(run=_keys)


def _add_deal(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("deal", help="be the dealer: at an address, or to disk")
    command.add_argument("--listen", metavar="HOST:PORT", help="deal for the parties that connect (with --keys)")
    command.add_argument("--keys", type=Path, metavar="DIR", help="the dealer's folder")
    command.add_argument("--ahead", type=int, default=2, metavar="N", help="pairs made ahead (default %(default)s)")
    command.add_argument("--protocol", type=Path, metavar="FILE", help="to disk: what 'serve --describe' wrote")
    command.add_argument("--count", type=int, default=1, metavar="N", help="to disk: inferences (default %(default)s)")
    command.add_argument("--out", type=Path, metavar="DIR", help="to disk: gets DIR/server and DIR/client")
    command.set_defaults(run=_deal)


def _add_serve(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("serve", help="be the server: hold the model")
    command.add_argument("--model", type=Path, required=True, metavar="CHECKPOINT")
    command.add_argument("--listen", metavar="HOST:PORT", help="port 0: the system chooses")
    _add_party_options(command, "the server's")
    _add_engine_settings(command)
    command.add_argument("--ranges", type=Path, metavar="FILE", help="of 'secure calibrate', for --gate-bits 32")
    command.add_argument(
        "--reveal", choices=("logits", "label"), default="logits", help="to the client (default %(default)s)"
    )
    command.add_argument("--queries", type=int, metavar="N", help="stop after N queries; 2 if one of them failed")
    command.add_argument(
        "--queue", type=int, default=8, metavar="N", help="queries that may wait (default %(default)s)"
    )
    command.add_argument("--mean", metavar="A,B,C", help="of pixels in 0..1 (default: the training data's)")
    command.add_argument("--std", metavar="A,B,C", help="goes with --mean")
    command.add_argument("--data-root", type=Path, help="folder of the official data files, where --mean is not given")
    command.add_argument("--describe", type=Path, metavar="FILE", help="write the protocol for the dealer, and stop")
    command.set_defaults(run=serve)


def _add_query(actions) -> None:  # type: ignore[no-untyped-def]
    command = actions.add_parser("query", help="be the client: hold the images, learn their labels")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a PNG, .npy or .pt file")
    command.add_argument("--connect", required=True, metavar="HOST:PORT", help="the server")
    _add_party_options(command, "the client's")
    command.add_argument("--logits", action="store_true", help="print them too")
    command.add_argument("--cache", type=Path, metavar="DIR", help="of masked weights (default ~/.cache/deepshare)")
    command.set_defaults(run=query)


def _add_engine_settings(command) -> None:  # type: ignore[no-untyped-def]
    command.add_argument("--weights", choices=("secret", "public"), default="secret", help="default %(default)s")
    command.add_argument("--affine", choices=("secret", "public"), help="alpha and beta (default as --weights)")
    command.add_argument(
        "--gate", choices=("auto", "tree", "dcf"), default="auto", help="comparison: default %(default)s"
    )
    command.add_argument(
        "--link",
        choices=("lan", "wan"),
        default="lan",
        help="for --gate auto: 1 Gb/s, 0.2 ms (default) or 100 Mb/s, 40 ms",
    )
    command.add_argument("--gate-bits", type=int, choices=(64, 32), default=64, help="default %(default)s")
    command.add_argument("--batch", type=int, default=1, help="images an inference (default %(default)s)")


def _add_party_options(command, whose: str) -> None:  # type: ignore[no-untyped-def]
    command.add_argument("--keys", type=Path, metavar="DIR", help=f"{whose} folder of 'secure keys'")
    tickets = command.add_mutually_exclusive_group()
    tickets.add_argument("--dealer", metavar="HOST:PORT", help="ask the dealer for material")
    tickets.add_argument("--material", type=Path, metavar="DIR", help=f"{whose} folder of 'secure deal --out'")


def _run(options: argparse.Namespace) -> None:
    from deepshare import secure
    from deepshare.checkpoint import load_checkpoint
    from deepshare.secure.engine.choose import WIRES

    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise secure.SecureError(f"secure run: --json: the folder of {options.json} does not exist")
    checkpoint = load_checkpoint(options.checkpoint)
    dataset = data_set(checkpoint, options.data, options.data_root, "--data is needed")
    if options.images < 1:
        raise secure.SecureError(f"secure run: --images must be at least 1 (got {options.images})")
    images, labels = dataset.test.images[: options.images], dataset.test.labels[: options.images]
    report = secure.run(
        checkpoint,
        dataset.normalise(images),
        labels,
        engine=options.engine,
        provider=options.provider,
        weights=options.weights,
        affine=options.affine,
        gate=options.gate,
        wire=WIRES[options.link],
        gate_bits=options.gate_bits,
        batch=options.batch,
        name=str(options.checkpoint),
        progress=_show_images if sys.stderr.isatty() else None,
    )
    print(report)
    if options.json is not None:
        report.save(options.json)


def _show_images(done: int, total: int) -> None:
    """One line on the terminal, written over."""
    print(f"\r{done}/{total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _calibrate(options: argparse.Namespace) -> None:
    from deepshare.checkpoint import load_checkpoint
    from deepshare.secure import SecureError
    from deepshare.secure.calibrate import calibrate
    from deepshare.secure.fixed_point import encode
    from deepshare.secure.lower import lower

    checkpoint = load_checkpoint(options.checkpoint)
    if options.images < 1:
        raise SecureError(f"secure calibrate: --images must be at least 1 (got {options.images})")
    dataset = data_set(checkpoint, options.data, options.data_root, "--data is needed")
    channels, height, width = checkpoint.spec["input_size"]
    program, tensors = lower(checkpoint.model, (channels, height, width))
    images = dataset.normalise(dataset.train.images[: options.images])
    ranges = calibrate(program, tensors, encode(images, name="images"))
    print(ranges)
    if options.out is not None:
        print(f"written: {ranges.save(options.out)}")


def _keys(options: argparse.Namespace) -> None:
    from deepshare.secure.net.keys import make_keys

    for folder in make_keys(options.folder, clients=options.clients, days=options.days):
        print(f"{folder}: carry it to the {folder.name}'s machine")
    print(f"{options.folder / 'authority'}: keep it apart; the certificates expire in {options.days} days")


def _deal(options: argparse.Namespace) -> None:
    from deepshare.secure import SecureError

    to_disk = options.protocol is not None and options.out is not None
    if to_disk == (options.listen is not None):
        raise SecureError("secure deal: needs either --listen and --keys, or --protocol and --out")
    if to_disk:
        _deal_to_disk(options)
    else:
        _deal_live(options)


def _deal_to_disk(options: argparse.Namespace) -> None:
    from deepshare.secure.engine.protocol import Protocol
    from deepshare.secure.net.deal import deal_to_disk

    protocol = Protocol.from_json(options.protocol.read_text(errors="replace"))
    server, client = deal_to_disk(protocol, options.count, options.out)
    print(f"{options.out}: {options.count} inferences, {server:,} bytes each for the server, {client:,} for the client")


def _deal_live(options: argparse.Namespace) -> None:
    import threading

    from deepshare.secure.net.connect import Address
    from deepshare.secure.net.deal import Dealer
    from deepshare.secure.net.keys import Identity
    from deepshare.secure.net.log import log

    identity = Identity.load(needed("deal", "--keys", options.keys), "dealer")
    dealer = Dealer(Address.parse("--listen", options.listen), identity, ahead=options.ahead, log=log)
    print(f"ready: {dealer.address}", flush=True)
    try:
        threading.Event().wait()
    finally:
        dealer.close("it was stopped")
