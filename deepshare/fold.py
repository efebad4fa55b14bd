"""Batch normalisation folded into the convolution before it (eval mode, exact up to rounding)."""

import torch
from torch import Tensor, fx, nn


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) in float64 with norm(x) = scale[c] * x + shift[c] in eval mode.

    scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("fold: BatchNorm2d must have running statistics (got track_running_stats=False)")
    scale = (var.double() + norm.eps).rsqrt()
    shift = -mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()


def fold_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution equal to norm(conv(x)) in eval mode: W' = scale * W, b' = shift + scale * b."""
    scale, shift = affine_of(norm)
    weight = conv.weight.detach().double() * scale.reshape(-1, 1, 1, 1)
    bias = shift if conv.bias is None else shift + scale * conv.bias.detach().double()
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
    )
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return folded.eval()


def fold_batch_norm(graph_module: fx.GraphModule) -> int:
    """Folds, in place, every BatchNorm2d that alone reads a Conv2d's result; returns how many.

    A convolution module that is called twice, or whose result is read elsewhere too, keeps its batch norm, which is
    then lowered to an affine step of its own.
    """
    modules = dict(graph_module.named_modules())
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in list(graph_module.graph.nodes):
        pair = _foldable(node, modules, calls)
        if pair is None:
            continue
        conv, norm = pair
        source = node.args[0]
        graph_module.set_submodule(str(source.target), fold_into(conv, norm))
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        folded += 1
    graph_module.graph.lint()
    graph_module.recompile()
    return folded


def _foldable(
    node: fx.Node, modules: dict[str, nn.Module], calls: list[object]
) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return None
    conv, norm = modules[str(source.target)], modules[str(node.target)]
    if not isinstance(conv, nn.Conv2d) or calls.count(source.target) != 1:
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or not torch.is_floating_point(conv.weight):
        return None
    return conv, norm
