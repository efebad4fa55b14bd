"""What a run is asked for, checked before any process starts, and what it is compared with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepshare.secure.errors import SecureError

if TYPE_CHECKING:
    from deepshare.checkpoint import Checkpoint

PLAIN_BATCH = 256  # the plain run's batch, for memory only


def open_checkpoint(
    checkpoint: "str | Path | Checkpoint", images: Tensor, name: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what `run_model` calls it: name and convention.

    Raises:
        SecureError: images of another size than the checkpoint's. CheckpointError: it is damaged.
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
    return loaded.model, {"name": name, "convention": counted}


def check_images(images: Tensor, labels: Tensor, batch: int) -> None:
    """Raises SecureError for images or labels of another form, or a batch that they do not fill once."""
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise SecureError(
            f"secure: images must be a float tensor [N, C, H, W], normalised as in training, N >= 1 "
            f"(got {images.dtype} {list(images.shape)})"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise SecureError(f"secure: labels must be integers [{len(images)}] (got {labels.dtype} {list(labels.shape)})")
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= len(images):
        raise SecureError(f"secure: batch must be in 1..{len(images)}, the number of images (got {batch!r})")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises SecureError for a value that is none of these."""
    if value not in allowed:
        raise SecureError(f"secure: {name} must be {' or '.join(map(repr, allowed))} (got {value!r})")


def plain_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The network's own, in eval mode on its own device; the model is left as it was."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        logits = [model(part.to(device)).cpu() for part in images.split(PLAIN_BATCH)]
    model.train(was_training)
    return torch.cat(logits)


def agreement(secure: Tensor, plain: Tensor, labels: Tensor) -> dict[str, Any]:
    """Shares of images: equal argmax, and accuracy of each; secure and plain are classes [N]."""
    truth = labels.cpu()
    hits = {"agreement": secure == plain, "accuracy_secure": secure == truth, "accuracy_plain": plain == truth}
    return {name: float(hit.double().mean()) for name, hit in hits.items()}
