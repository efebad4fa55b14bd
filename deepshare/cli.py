"""The command line: `deepshare doctor | count | train | criticality | compare | reproduce | secure | demo | ...`."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepshare.arguments import ArgumentError, ints

if TYPE_CHECKING:
    from deepshare.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did its work, 2 with one line on stderr for bad input, 130 after Ctrl-C.

    75 (the system's "try again"): training paused in time, the same command goes on.
    """
    _end_on_sigterm()
    try:
        options = _parser().parse_args(arguments)
        _check_processes(options.command)
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("deepshare: interrupted", file=sys.stderr)
        return 130
    except _pauses() as pause:
        _tell(pause)
        return os.EX_TEMPFAIL
    except _bad_input() as error:
        _tell(error)
        return 2


def _tell(error: Exception) -> None:
    """One line on stderr, once if several processes agree on it."""
    from deepshare.train.distributed import is_told_elsewhere

    if not is_told_elsewhere(error):
        print(f"deepshare: {error}", file=sys.stderr)


IN_SEVERAL_PROCESSES = ("train", "reproduce")


def _check_processes(command: str) -> None:
    """Under torchrun every process runs the command: those that know nothing of it would write over each other."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and command not in IN_SEVERAL_PROCESSES:
        raise ArgumentError(f"{command} is one process; torchrun starts several of {', '.join(IN_SEVERAL_PROCESSES)}")


def _end_on_sigterm() -> None:
    """SIGTERM ends a command as Ctrl-C does, so that its processes and working folders go with it."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _pauses() -> type[Exception]:
    from deepshare.train import TrainingPaused

    return TrainingPaused


def _bad_input() -> tuple[type[Exception], ...]:
    """What the parts raise for bad input; anything else is a bug and keeps its traceback."""
    from deepshare.analysis.bench_records import BenchReportError
    from deepshare.analysis.drawing import DrawingError
    from deepshare.budget import BudgetError
    from deepshare.checkpoint import CheckpointError
    from deepshare.compare import CompareError
    from deepshare.data import DataError
    from deepshare.methods.conv_algebra import MergeError
    from deepshare.methods.equalization import EqualizationError
    from deepshare.methods.snl import SNLError
    from deepshare.plan import PlanError
    from deepshare.report import ReportError
    from deepshare.reproduce import ReproduceError
    from deepshare.secure import SecureError
    from deepshare.train import RecipeError, TrainingError

    ours = (BudgetError, CheckpointError, CompareError, DataError, PlanError, RecipeError, SecureError, TrainingError)
    methods = (EqualizationError, MergeError, SNLError)
    return (*ours, *methods, BenchReportError, DrawingError, ReportError, ReproduceError, ArgumentError, OSError)


def _parser() -> argparse.ArgumentParser:
    from deepshare import __version__, report_cli, reproduce_cli, secure_cli, train_cli

    parser = argparse.ArgumentParser(prog="deepshare", description="Shared ReLU gates for private inference.")
    parser.add_argument("--version", action="version", version=f"deepshare {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_doctor,
        _add_count,
        train_cli.add,
        reproduce_cli.add,
        report_cli.add,
        secure_cli.add,
        _add_demo,
        _add_bench_report,
    ):
        add(commands)
    return parser


def _add_doctor(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("doctor", help="what is built, what is used on which device, and why")
    command.set_defaults(run=_doctor)


def _add_count(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("count", help="DReLUs per activation site and in total")
    command.add_argument("model", nargs="?", help="a model's name (see --list) or a checkpoint (.safetensors)")
    command.add_argument("--list", action="store_true", help="name the networks of the papers, and stop")
    command.add_argument("--input", metavar="CxHxW", help="image size (default 3x32x32)")
    command.add_argument("--plan", type=Path, help="count this plan (JSON) on the model")
    command.add_argument("--width", type=int, help="channels of the first convolution (default as published)")
    command.add_argument("--stem-relu", action="store_true", default=None, help="count a ReLU after the stem")
    command.add_argument("--multipliers", metavar="A,B,C", help="channels of each further stage, as a factor")
    command.add_argument("--channels", metavar="A,B,...", help="channels of each stage, in place of the two above")
    command.add_argument("--blocks", metavar="N,N,...", help="blocks per stage")
    command.add_argument("--cost", action="store_true", help="also FLOPs and parameters, by site and by stage")
    command.add_argument("--rho", type=float, help="0.5: feature maps of half the height and width")
    command.set_defaults(run=_count)


def _add_demo(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("demo", help="the whole road on handwritten digits, in minutes")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    command.set_defaults(run=_demo)


def _add_bench_report(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("bench-report", help="benchmark records as tables, targets beside what was reached")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what `make bench` recorded")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write the report and its pictures there")
    command.set_defaults(run=_bench_report)


def _doctor(options: argparse.Namespace) -> None:
    from deepshare import doctor

    print(doctor.report())


def _count(options: argparse.Namespace) -> None:
    from deepshare import models
    from deepshare.plan import Plan, parse_input_size

    if options.list:
        print("\n".join((*models.names(), *models.patterns())))
    elif options.model is None:
        raise ArgumentError("MODEL is missing: a model's name (see --list) or a checkpoint file")
    elif models.is_name(options.model):
        size = parse_input_size(options.input or "3x32x32")
        plan = None if options.plan is None else Plan.load(options.plan)
        settings = _model_settings(options)
        if options.cost:
            _print_cost({"name": options.model, "in_channels": size[0], **settings}, size, plan)
        else:
            print(models.count_table(options.model, size, plan=plan, **settings))
    elif Path(options.model).is_file():
        _count_checkpoint(options)
    else:
        known = ", ".join(models.known())
        raise ArgumentError(f"MODEL must be one of {known}, or a checkpoint file (got {options.model!r})")


def _count_checkpoint(options: argparse.Namespace) -> None:
    from deepshare import models
    from deepshare.checkpoint import load_checkpoint

    for name in ("input", "plan", *_MODEL_SETTINGS):  # a checkpoint says these itself
        if getattr(options, name) is not None:
            raise ArgumentError(f"--{name.replace('_', '-')} goes with a model's name, not with a checkpoint")
    checkpoint = load_checkpoint(options.model)
    if options.cost:
        print(f"{options.model}:")
        _print_cost(checkpoint.spec, checkpoint.plan.input_size, checkpoint.plan)
    else:
        print(f"{options.model}: {models.describe(checkpoint.spec)}\n{checkpoint.plan.table()}")


def _print_cost(spec: dict[str, Any], size: tuple[int, ...], plan: "Plan | None") -> None:
    from deepshare import models
    from deepshare.analysis.cost import cost

    print(models.describe(spec))
    print(cost(models.shapes_only(spec), size, plan=plan).table())
    for stem_relu in (False, True):
        found = cost(models.shapes_only({**spec, "stem_relu": stem_relu}), size)
        print(f"All ReLUs, {models.convention(stem_relu, spec['name'])}: {found.relus:,}.")


_MODEL_SETTINGS = ("width", "stem_relu", "multipliers", "channels", "blocks", "rho")


def _model_settings(options: argparse.Namespace) -> dict[str, Any]:
    """`models.create`'s settings of those options that were given."""
    given = {name: getattr(options, name) for name in _MODEL_SETTINGS if getattr(options, name) is not None}
    for name in ("multipliers", "channels", "blocks"):
        if name in given:
            given[name] = ints(f"--{name}", given[name])
    return given


def _demo(options: argparse.Namespace) -> None:
    from deepshare import demo

    demo.run(options.out)


def _bench_report(options: argparse.Namespace) -> None:
    from deepshare.analysis import bench_report
    from deepshare.analysis.bench_records import read_run

    if options.out is None:
        print(bench_report.report([read_run(path) for path in options.files]))
    else:
        print(f"written: {bench_report.write(options.files, options.out)}")
