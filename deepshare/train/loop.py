"""The two loops: one epoch of training, one pass of evaluation."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deepshare.data import Batch, Batches
from deepshare.nn import LearnedMask, SharedReLU2d
from deepshare.train.distributed import Ranks
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.step import TrainingStep


def train_epoch(
    step: TrainingStep,
    batches: Iterable[Batch],
    after_step: Callable[[int, Tensor], None],
) -> float:
    """Train with `step` on `batches` once; returns the mean loss.

    `after_step(steps, sum of losses so far)` gets the sum as a tensor on the device: reading it waits for the
    device, so the reader decides how often. The loop itself waits once, at the end.
    """
    step.model.train()
    total, steps = torch.zeros(()), 0
    for batch in batches:
        total = step(batch) + total.to(batch.images.device)
        steps += 1
        after_step(steps, total)
    return float(total) / max(steps, 1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, ranks: Ranks | None = None) -> float | None:
    """Share of images whose label has the largest logit, in [0, 1]; None if there are no images.

    ranks: the processes that have a part of each batch, as `batches` was made
    """
    model.eval()
    right = [(model(batch.images).argmax(1) == batch.labels).sum() for batch in batches]
    count = torch.stack(right).sum() if right else torch.zeros((), dtype=torch.int64)
    count = count if ranks is None else ranks.total(count)
    return float(count) / batches.image_count if batches.image_count else None


def make_optimizer(model: nn.Module, phase: PhaseRecipe) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, as DeepShare Table 7; for the phase "masks" Adam (SNL Algorithm 1, line 5).

    Weight decay leaves alpha, beta and masks alone unless phase.decay_affine: no paper says, and decay would pull
    alpha and beta to 0, where a channel is neither gated nor passed on; masks have the lasso. Adam's first decay rate
    is phase.momentum.
    """
    gates = [module for module in model.modules() if isinstance(module, SharedReLU2d)]
    affine = {id(value) for module in gates for value in (module.alpha, module.beta)}
    affine |= {id(module.mask) for module in model.modules() if isinstance(module, LearnedMask)}
    learned = [value for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in learned if id(value) not in affine], "weight_decay": phase.weight_decay},
        {
            "params": [value for value in learned if id(value) in affine],
            "weight_decay": phase.weight_decay if phase.decay_affine else 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if phase.kind == "masks":
        return torch.optim.Adam(groups, lr=phase.lr, betas=(phase.momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, fused=True)
