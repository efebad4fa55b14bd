"""`deepshare train | criticality | compare`: their options, and what they call."""

import argparse
from pathlib import Path

from deepshare.arguments import ArgumentError, ints


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the subparsers of `deepshare`."""
    for add_one in (_add_train, _add_criticality, _add_compare):
        add_one(commands)


def _add_train(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("train", help="run every phase of a recipe")
    command.add_argument("recipe", nargs="?", help="a recipe's name or a TOML file")
    command.add_argument("--list", action="store_true", help="name the recipes that come with the package, and stop")
    _add_run_options(command)
    command.add_argument("--artifacts", type=Path, metavar="FOLDER", help="take phases from there, and keep them there")
    command.add_argument(
        "--max-minutes", type=float, metavar="M", help="stop in time, with status 75; --resume goes on"
    )
    command.set_defaults(run=_train)


def _add_criticality(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("criticality", help="how much each stage's ReLUs matter (DeepReDuce): trains to see")
    command.add_argument("recipe", help="a recipe's name or a TOML file, as demo-criticality")
    command.add_argument("--seeds", metavar="N,N,...", help="train every stage once per seed (default the recipe's)")
    command.add_argument("--split", choices=("val", "test"), default="val", help="default %(default)s")
    _add_run_options(command)
    command.set_defaults(run=_criticality)


def _add_run_options(command) -> None:  # type: ignore[no-untyped-def]
    command.add_argument("--out", type=Path, help="run folder (default runs/RECIPE)")
    command.add_argument("--data-root", type=Path, help="folder of the official data files")
    command.add_argument("--teacher", type=Path, help="distil from this checkpoint, train no teacher")
    command.add_argument("--device", help="default: the first CUDA device, else the CPU")
    command.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe: phase.*.epochs=2"
    )


def _add_compare(commands) -> None:  # type: ignore[no-untyped-def]
    command = commands.add_parser("compare", help="methods side by side at equal DReLU count")
    command.add_argument("recipe", nargs="?", help="a comparison's name or a TOML file")
    command.add_argument("--list", action="store_true", help="name the comparisons in the package, and stop")
    command.add_argument("--out", type=Path, help="folder (default runs/RECIPE); a stopped one goes on there")
    command.add_argument("--artifacts", type=Path, metavar="FOLDER", help="take phases from there, and keep them there")
    command.add_argument("--data-root", type=Path, help="folder of the official data files")
    command.add_argument("--device", help="default: the first CUDA device, else the CPU")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the comparison: seeds=[0]"
    )
    command.set_defaults(run=_compare)


def _train(options: argparse.Namespace) -> None:
    from deepshare.train import ArtifactStore, load_recipe, recipe_names, train
    from deepshare.train.distributed import joined

    if options.list:
        print("\n".join(recipe_names()))
        return
    if options.recipe is None:
        raise ArgumentError("RECIPE is missing: a recipe's name (see --list) or a TOML file")
    with joined(options.device) as ranks:
        recipe = ranks.agree(lambda: load_recipe(options.recipe, options.set))
        result = train(
            recipe,
            options.out or Path("runs") / recipe.name,
            data_root=options.data_root,
            device=options.device,
            resume=options.resume,
            teacher=options.teacher,
            artifacts=None if options.artifacts is None else ArtifactStore(options.artifacts),
            max_minutes=options.max_minutes,
        )
        if ranks.is_writer:
            drelus, accuracy = result.plan.drelus, 100 * result.test_accuracy
            print(f"{result.checkpoint}: {drelus:,} DReLUs, test accuracy {accuracy:.2f} %")


def _criticality(options: argparse.Namespace) -> None:
    from deepshare.compare.criticality import measure
    from deepshare.train import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    found = measure(
        recipe,
        options.out or Path("runs") / recipe.name,
        seeds=None if options.seeds is None else ints("--seeds", options.seeds),
        teacher=options.teacher,
        split=options.split,
        data_root=options.data_root,
        device=options.device,
        resume=options.resume,
    )
    print(found.table())


def _compare(options: argparse.Namespace) -> None:
    from deepshare import compare
    from deepshare.analysis.drawing import check_can_draw
    from deepshare.compare import report
    from deepshare.train import ArtifactStore

    if options.list:
        print("\n".join(compare.compare_recipe_names()))
        return
    if options.recipe is None:
        raise ArgumentError("RECIPE is missing: a comparison's name (see --list) or a TOML file")
    recipe = compare.load_compare_recipe(options.recipe, options.set)
    check_can_draw()
    folder = options.out or Path("runs") / recipe.name
    artifacts = None if options.artifacts is None else ArtifactStore(options.artifacts)
    results = compare.compare(recipe, folder, data_root=options.data_root, device=options.device, artifacts=artifacts)
    print(f"\n{report.table(results)}\n\nwritten: {report.write(recipe, results, folder)}")
