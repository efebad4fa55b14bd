"""The main job, end to end on real images: train, count, run between two parties, compare."""

from collections.abc import Callable
from pathlib import Path

import torch

from deepshare import data, secure
from deepshare.analysis.comparison import NetworkResult, comparison_table, plot_comparison
from deepshare.analysis.drawing import check_can_draw
from deepshare.files import write_whole
from deepshare.secure.baseline.crypten_import import missing_modules
from deepshare.secure.engine.protocol import Secrecy
from deepshare.secure.session import Engine
from deepshare.train import TrainResult, load_recipe, train

RECIPES = ("demo-relu", "demo-960", "demo-240")
LABELS = {"demo-relu": "all-ReLU", "demo-960": "DeepShare", "demo-240": "DeepShare"}
WEIGHTS: tuple[Secrecy, ...] = ("secret", "public")
YARDSTICK = ("demo-relu", "demo-240")  # run on CrypTen's operations too, if it is installed
IMAGES = 40  # per secure run: a few seconds a network


def run(out: Path, say: Callable[[str], None] = print) -> Path:
    """Train three networks on handwritten digits, run each between two parties, write the comparison to `out`.

    An all-ReLU ResNet18 (width 16, 1x8x8) and DeepShare at 960 and 240 DReLUs, distilled from one GELU teacher; each
    runs with secret and with public weights, two of them under CrypTen too where it is installed. A killed run
    continues when called again.

    Returns:
        out/report.md; beside it comparison.png, and a folder per network: plan.json, checkpoints, log.txt, costs.

    Raises:
        SecureError, TrainingError, DataError: as raised by the parts. DrawingError: matplotlib is missing (before
            anything is trained).
    """
    check_can_draw()
    out.mkdir(parents=True, exist_ok=True)
    trained = _train_all(out)
    runs: list[tuple[Engine, Secrecy, str]] = [("deepshare", weights, name) for weights in WEIGHTS for name in trained]
    if missing_modules():
        say("CrypTen is not installed (deepshare doctor): no yardstick beside the engine")
    else:
        runs += [("crypten", weights, name) for weights in WEIGHTS for name in YARDSTICK]
    results = [_secure_run(name, trained[name], weights, engine, say) for engine, weights, name in runs]
    plot_comparison(results, out / "comparison.png")
    table = comparison_table(results)
    report = write_whole(out / "report.md", _report(table, results))
    say(f"\n{table}\n\nwritten: {report}, {out / 'comparison.png'}")
    return report


def _train_all(out: Path) -> dict[str, TrainResult]:
    """Every network; the first recipe trains the teacher, the others distil from it too.

    On one thread: at 8x8 a second one gains nothing (29.5 against 30.6 s for the first recipe on two idle cores), and
    on a busy machine the two wait for each other (a tenth of the speed seen).
    """
    trained: dict[str, TrainResult] = {}
    teacher: Path | None = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in RECIPES:
            trained[name] = train(load_recipe(name), out / name, device="cpu", resume=True, teacher=teacher)
            teacher = teacher or trained[name].phase_checkpoint("teacher")
    finally:
        torch.set_num_threads(threads)
    return trained


def _secure_run(
    name: str, result: TrainResult, weights: Secrecy, engine: Engine, say: Callable[[str], None]
) -> NetworkResult:
    digits = data.load("digits")
    images, labels = digits.normalise(digits.test.images[:IMAGES]), digits.test.labels[:IMAGES]
    report = secure.run(result.checkpoint, images, labels, weights=weights, engine=engine)
    report.save(result.run_dir / f"secure-{engine}-{weights}.json")
    say(
        f"{engine} {name}, weights {weights}: {report.rounds} rounds, {report.megabytes:.3f} MB, "
        f"{report.seconds_online:.3f} s an image"
    )
    return NetworkResult(LABELS[name], result.test_accuracy, report)


def _report(table: str, results: list[NetworkResult]) -> str:
    facts = results[0].secure
    return f"""# DeepShare on handwritten digits

ResNet18 (width 16, 1x8x8, no stem ReLU) on scikit-learn's digits, trained and run by `deepshare demo`.

{table}

![accuracy and latency over DReLUs](comparison.png)

- Test accuracy: plain PyTorch, the whole test set, measured once.
- Rounds and MB: counted, exact, one image. MB are 10^6 bytes: one way, online, of the busier
  party; before, from the dealer to both parties and from the client.
- Seconds: from the image to the logits at the client, median over {facts.images} images, batch {facts.batch},
  {facts.device}. deepshare's transport is {facts.transport}.
- Weights secret: only the server knows them. Public: both do, no model privacy.
- deepshare: {facts.engine}; {facts.provider} is {facts.provider_note}.
- CrypTen: its own operations, provider TFP, a stand-in by which the server knows every triple; no dealing is counted.
"""
