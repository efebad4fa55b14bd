"""ReLU-reuse (DeepReShape, section 4.2): a convolution in groups of which only the last has ReLUs, 1/N of the channels.

    y = conv1x1(concat(y_1, ..., y_G))        x, the input, is split into the groups x_1, ..., x_G

"naive", N groups of C/N channels:
    y_i = bn(conv(x_i + y_{i-1}))             without y_{i-1} for i = 1, and everywhere if shortcuts is False
    y_N = relu(bn(conv(x_N + y_{N-1})))
"three", groups of C/4, C - C/4 - C/N and C/N channels for every N:
    y_1 = x_1
    y_2 = bn(conv(x_2))
    y_3 = relu(bn(conv(x_3 + bn(conv1x1(y_2)))))

The paper draws this (Figure 9) and cites Res2Net; it prints no equations. docs/deepreshape.md says how the FLOPs it
prints for "three" leave these and no other.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Form = Literal["three", "naive"]
FORMS: tuple[str, ...] = get_args(Form)
KEPT = 4  # "three" keeps one fourth of the channels as they come
MOST_FACTOR = 4096


def group_sizes(channels: int, factor: int, form: Form) -> tuple[int, ...]:
    """Channels of each group. Raises ValueError unless `factor` (and, for "three", 4) divides `channels`."""
    divisors = (factor, KEPT) if form == "three" else (factor,)
    for divisor in divisors:
        if channels < divisor or channels % divisor:
            raise ValueError(
                f"relu_reuse: channels must be a multiple of {divisor} for factor {factor} (got {channels})"
            )
    if form == "naive":
        return (channels // factor,) * factor
    kept, active = channels // KEPT, channels // factor
    return (kept, channels - kept - active, active)


class ReuseConv2d(nn.Module):
    """ReLU-reuse in place of a convolution and the ReLU behind it; a batch norm, if any, follows as it did.

    `relu` is the one activation, on C/N channels. Where the convolution has a stride or changes the number of channels,
    a group's input cannot be added to another's output: then there are no shortcuts, as in Res2Net's first block of
    a stage, and "three" projects x_1 by a 1x1 convolution and a batch norm, as a ResNet's shortcut does.

    Args:
        inputs, outputs: channels.
        kernel_size, stride: of the convolutions of the groups, padded to keep the image's size up to the stride.
        factor: N, by which the ReLUs are divided; at least 2.
        form: "three" (the paper's proposal) or "naive".
        shortcuts: whether a group also sees its predecessor's output.
        bias: of the 1x1 convolution; the others have batch norms behind them.

    Raises:
        ValueError: a factor below 2, an unknown form, or channels that cannot be split (`group_sizes`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, int],
        *,
        factor: int,
        form: Form = "three",
        shortcuts: bool = True,
        stride: tuple[int, int] = (1, 1),
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_settings(factor, form, shortcuts)
        self.splits = group_sizes(inputs, factor, form)
        sizes = group_sizes(outputs, factor, form)
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        same = inputs == outputs and tuple(stride) == (1, 1)
        pairs = list(zip(self.splits, sizes, strict=True))
        self.groups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, kernel_size, stride, padding, bias=False), nn.BatchNorm2d(o))
            for i, o in pairs
        )
        if form == "three":
            self.groups[0] = nn.Identity() if same else _projection(*pairs[0], stride)
        self.carries = nn.ModuleList(_carry(sizes, group, form, same and shortcuts) for group in range(len(sizes)))
        self.relu = nn.ReLU()
        self.mix = nn.Conv2d(outputs, outputs, 1, bias=bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]
        done: list[Tensor] = []
        start = 0
        for size, group, carry in zip(self.splits, self.groups, self.carries, strict=True):
            part = x.narrow(1, start, size)  # not split: torch.fx cannot walk a tuple it does not know
            done.append(group(part if isinstance(carry, _Nothing) else part + carry(done[-1])))
            start += size
        done[-1] = self.relu(done[-1])
        return self.mix(torch.cat(done, 1))


class _Nothing(nn.Module):
    """Stands where a group has no shortcut."""


def _projection(inputs: int, outputs: int, stride: tuple[int, int] = (1, 1)) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _carry(sizes: Sequence[int], group: int, form: Form, wanted: bool) -> nn.Module:
    """How the output of the group before comes to `group`: not at all, as it is, or by 1x1 where sizes differ."""
    if not wanted or group == 0 or (form == "three" and group == 1):
        return _Nothing()
    before, here = sizes[group - 1], sizes[group]
    return nn.Identity() if before == here else _projection(before, here)


def check_settings(factor: object, form: object, shortcuts: object) -> None:
    """Raises ValueError for a factor that is no int from 2 to its limit, an unknown form, shortcuts that are no bool.

    Checked before any size is computed, since settings come from files too.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= MOST_FACTOR:
        raise ValueError(f"relu_reuse: factor must be an int in 2..{MOST_FACTOR} (got {factor!r:.80})")
    if form not in FORMS:
        raise ValueError(f"relu_reuse: form must be one of {', '.join(FORMS)} (got {form!r:.80})")
    if not isinstance(shortcuts, bool):
        raise ValueError(f"relu_reuse: shortcuts must be a bool (got {shortcuts!r:.80})")


def with_reuse(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A copy of `model` with `ReuseConv2d`, freshly initialised, in place of some convolutions.

    Args:
        settings: a spec's "reuse": {"layers": paths of convolutions, "factor": N, "form": "three", "shortcuts": True},
            the last two optional.

    Raises:
        ValueError: a key is missing or unknown, a layer is no convolution that can be split (the message names it).
    """
    if not isinstance(settings, Mapping) or not {"layers", "factor"} <= settings.keys() <= _KEYS:
        raise ValueError(
            f"relu_reuse: settings must have layers and factor, may have form, shortcuts (got {settings!r:.80})"
        )
    layers, factor = settings["layers"], settings["factor"]
    form, shortcuts = settings.get("form", "three"), settings.get("shortcuts", True)
    check_settings(factor, form, shortcuts)
    named = isinstance(layers, list | tuple) and all(isinstance(path, str) for path in layers)
    if not named or len(set(layers)) != len(layers):
        raise ValueError(f"relu_reuse: layers must be a list of different module paths (got {layers!r:.80})")
    result = copy.deepcopy(model)
    for path in layers:
        conv = splittable(result, path)
        try:
            replaced = _in_place_of(conv, factor, form, shortcuts)
        except ValueError as error:
            raise ValueError(f"{error}, at layer {path!r}") from error
        result.set_submodule(path, replaced)
    return result


_KEYS = {"layers", "factor", "form", "shortcuts"}


def splittable(model: nn.Module, path: str) -> nn.Conv2d:
    """The convolution at `path`.

    Raises:
        ValueError: it is none; it has groups or dilation; or it does not keep the image's size up to its stride (odd
            kernels, padded by half of them with zeros), as what goes around it does.
    """
    conv = dict(model.named_modules()).get(path)
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"relu_reuse: layer {path!r:.80} must be a convolution (got {type(conv).__name__})")
    padded = [side % 2 and side // 2 for side in conv.kernel_size] == list(
        conv.padding
    ) and conv.padding_mode == "zeros"
    if conv.groups != 1 or set(conv.dilation) != {1} or not padded:
        raise ValueError(
            f"relu_reuse: layer {path!r:.80} must have neither groups nor dilation, and zeros around it, half of an "
            f"odd kernel (got {conv})"
        )
    return conv


def _in_place_of(conv: nn.Conv2d, factor: int, form: Form, shortcuts: bool) -> ReuseConv2d:
    with torch.device(conv.weight.device):
        made = ReuseConv2d(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            factor=factor,
            form=form,
            shortcuts=shortcuts,
            stride=(conv.stride[0], conv.stride[1]),
            bias=conv.bias is not None,
        )
    return made.to(conv.weight.dtype).train(conv.training)
