"""What a network is trained towards: objects that turn a batch into a loss, so that the loop knows nothing of it."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepshare.data import Batch
from deepshare.methods.snl import lasso_norm
from deepshare.train.teacher import Teacher, full_precision


class Task(Protocol):
    """A loss: scalar tensor with gradient, from the student and a batch; float32 at least."""

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor: ...


class HardLabels:
    """Cross entropy with the labels."""

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(full_precision(student(batch.images)), batch.labels)


class Divergence(Protocol):
    """How far a student's logits are from a teacher's: scalar, the mean over the batch."""

    def __call__(
        self,
        student: Tensor,  # [N, K], divided by the temperature
        teacher: Tensor,  # [N, K], divided by the temperature
        labels: Tensor,  # int64 [N]
    ) -> Tensor: ...


def kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) (Hinton et al. 2015)."""
    return _kl(F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1))


def target_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """TCKD (Zhao et al. 2022): KL between the two-way distributions (p, 1 - p), p the label's share."""
    return _kl(_target_or_not(student, labels), _target_or_not(teacher, labels))


def other_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """NCKD (Zhao et al. 2022): KL between the distributions over all classes but the label's."""
    return _kl(F.log_softmax(_others(student, labels), dim=1), F.log_softmax(_others(teacher, labels), dim=1))


def _kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _target_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """log (p, 1 - p), [N, 2]; 1 - p is summed from the other classes, as it would vanish beside a p near 1."""
    target, others = logits.gather(1, labels[:, None]), _others(logits, labels).logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([target, others], dim=1), dim=1)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [N, K - 1] of every class but the label's. A boolean index would make the device wait."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, index + (index >= labels[:, None]))


class Decoupled:
    """DKD (Zhao et al. 2022, "Decoupled Knowledge Distillation"): alpha * TCKD + beta * NCKD.

    KL = TCKD + (1 - p) * NCKD with p the teacher's share of the label: where the teacher is sure, plain distillation
    shuts out what it knows of the other classes; beta does not. The paper's alpha is 1, its beta is tuned by network.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.alpha * target_kl(student, teacher, labels) + self.beta * other_kl(student, teacher, labels)


class Distillation:
    """Distillation from a frozen teacher (DeepShare section 3.3, appendix B: temperature 4).

        loss = (1 - w) * CE(student, labels) + w * T^2 * D(student / T, teacher / T), D = KL by default

    DeepShare gives no w; SNL, whose schedule it takes over, weighs both equally (section 4), so w = 0.5 is our
    default. T^2 keeps the size of the soft gradient independent of T.
    """

    def __init__(self, teacher: Teacher, temperature: float, weight: float, divergence: Divergence = kl) -> None:
        self.teacher = teacher
        self.temperature, self.weight, self.divergence = temperature, weight, divergence

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        soft_labels = self.teacher(batch) / self.temperature
        logits = full_precision(student(batch.images))
        soft = self.divergence(logits / self.temperature, soft_labels, batch.labels)
        return (1 - self.weight) * F.cross_entropy(logits, batch.labels) + self.weight * self.temperature**2 * soft


class WithLasso:
    """`task` plus lambda * sum |c| over the learned masks (SNL eq. 4).

    coefficient: lambda, a 0-dim tensor on the masks' device, to be filled: a captured step sees the new value
    """

    def __init__(self, task: Task, masks: Sequence[Tensor], coefficient: float) -> None:
        self.task, self.masks = task, masks
        self.coefficient = torch.tensor(coefficient, dtype=masks[0].dtype, device=masks[0].device)

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.task(student, batch) + self.coefficient * lasso_norm(self.masks)
