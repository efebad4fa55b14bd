"""Batch normalisation over the images of all ranks: N ranks compute what one process computes on the whole batch."""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are over all ranks; torch's nn.SyncBatchNorm refuses CPU tensors.

    Statistics travel in float64, as one sum a pass: (images, images * mean, images * (var + mean^2)) forward,
    (sum g, sum g * xhat) backward. Every rank must call its layers in the same order.

    The gradient to x is that of the sum of all ranks' losses; those to weight and bias are the rank's own share, which
    DistributedDataParallel averages with all others.

    Raises ValueError: it tracks no statistics, or a cumulative average (momentum None).
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "SyncedBatchNorm2d":
        """`norm` with its own parameters and buffers, the very tensors."""
        if not norm.track_running_stats or norm.momentum is None:
            raise ValueError("SyncedBatchNorm2d: wanted a batch norm that tracks a moving average")
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        synced._parameters, synced._buffers = norm._parameters, norm._buffers
        return synced.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _Synced.apply(x, self.weight, self.bias, self.eps)
        self._track(mean, var * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class _Synced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        mean, var, count = _statistics(x)
        mean32, var32 = mean.to(_wide(x)), var.to(_wide(x))
        ctx.save_for_backward(x, weight, mean32, (var32 + eps).rsqrt(), count)
        y = F.batch_norm(x, mean32, var32, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight, mean, scale, count = ctx.saved_tensors
        wide = _wide(x)
        g, normal = grad.to(wide), (x.to(wide) - _per_channel(mean)) * _per_channel(scale)
        own = torch.stack([g.sum((0, 2, 3)), (g * normal).sum((0, 2, 3))])
        whole = own.to(torch.float64, copy=True)  # reduced in place
        dist.all_reduce(whole)
        shift, slope = (whole / count).to(wide)
        factor = scale if weight is None else scale * weight
        dx = (g - _per_channel(shift) - normal * _per_channel(slope)) * _per_channel(factor)
        dweight, dbias = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return dx.to(x.dtype), dweight, dbias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], biased variance [C], values per channel []) over all ranks, float64.

    A rank's own variance is about its own mean; only the sums over ranks are of squares, in float64, where they lose
    (mean / std)^2 * 1e-16.
    """
    images, channels, *rest = x.shape
    count = images * torch.Size(rest).numel()
    var, mean = (value.double() for value in torch.var_mean(x.to(_wide(x)), (0, 2, 3), correction=0))
    sums = torch.cat([count * mean, count * (var + mean * mean), mean.new_tensor([count])])
    dist.all_reduce(sums)
    first, second, total = sums.split([channels, channels, 1])
    mean = first / total
    return mean, (second / total - mean * mean).clamp_min(0), total[0]


def _wide(x: Tensor) -> torch.dtype:
    """What is computed in: float32 for half precision too."""
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(values: Tensor) -> Tensor:  # [C] -> [C, 1, 1]
    return values[:, None, None]


def synced(model: nn.Module, device: torch.device) -> nn.Module:
    """A twin of `model` whose batch norms are synced, over the same parameters, buffers and other modules.

    Train the twin, save the model. On CUDA the twin has nn.SyncBatchNorm, on the CPU SyncedBatchNorm2d.
    """
    if isinstance(model, nn.BatchNorm2d):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else SyncedBatchNorm2d.of(model)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    twin = copy.copy(model)
    twin._modules = {name: None if child is None else synced(child, device) for name, child in model._modules.items()}
    twin._parameters, twin._buffers = model._parameters, model._buffers
    return twin
