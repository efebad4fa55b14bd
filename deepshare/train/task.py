"""What a network is trained towards: objects that turn a batch into a loss, so that the loop knows nothing of it."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Task(Protocol):
    """A loss: scalar tensor with gradient, from the student, a batch and its labels."""

    def __call__(
        self,
        student: nn.Module,
        images: Tensor,  # float [N, C, H, W]
        labels: Tensor,  # int64 [N]
    ) -> Tensor: ...


class HardLabels:
    """Cross entropy with the labels."""

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student(images), labels)


class Distillation:
    """Hinton's distillation from a frozen teacher (DeepShare section 3.3, appendix B: temperature 4).

        loss = (1 - w) * CE(student, labels) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    DeepShare gives no w; SNL, whose schedule it takes over, weighs both equally (section 4), so w = 0.5 is our
    default. T^2 keeps the size of the soft gradient independent of T. KL is the mean over the batch.
    """

    def __init__(self, teacher: nn.Module, temperature: float, weight: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.weight = temperature, weight

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            soft_labels = F.log_softmax(self.teacher(images) / self.temperature, dim=1)
        logits = student(images)
        log_share = F.log_softmax(logits / self.temperature, dim=1)
        soft = F.kl_div(log_share, soft_labels, reduction="batchmean", log_target=True)
        return (1 - self.weight) * F.cross_entropy(logits, labels) + self.weight * self.temperature**2 * soft
