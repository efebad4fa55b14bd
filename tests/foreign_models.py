"""Networks that deepshare never saw, each with another habit, as people write them; for test_convert.py."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
SIZE = (3, 12, 12)


class Plain(nn.Module):
    """A CNN with functional ReLUs, one in place, one a method, one behind a linear layer; functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 9, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 2)
        x = F.max_pool2d(self.conv3(x).relu(), 2)
        x = F.relu(self.fc1(x.view(x.size(0), -1)))
        return self.fc2(F.dropout(x, 0.1, training=self.training))


class OneReLU(nn.Module):
    """A VGG-like chain of stages whose layers all call one nn.ReLU(inplace=True)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 16, 16]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = self.relu(norm(conv(x)))
            if i % 2 == 1:
                x = self.pool(x)
        return self.head(x.mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    """ResNet50's block: one in-place ReLU module, called three times; the shortcut is added in place."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        narrow, out = channels // 2, channels * stride
        self.conv1, self.bn1 = nn.Conv2d(channels, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None if stride == 1 else nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Bottleneck(8, 1), Bottleneck(8, 2), Bottleneck(16, 1))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class DenseLayer(nn.Module):
    """DenseNet's order, activation before convolution, over the concatenation of everything so far."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleDict({f"denselayer{i}": DenseLayer(8 + 4 * i, 4) for i in range(3)})
        self.norm, self.fc = nn.BatchNorm2d(20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers.values():
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class InvertedResidual(nn.Sequential):
    """MobileNetV2's block: expand, depthwise, project; nn.ReLU6 in place, the shortcut where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        wide = 3 * channels
        super().__init__(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.use_shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.use_shortcut else y


class Mobile(nn.Module):
    """With a functional ReLU6 after its last convolution."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [InvertedResidual(6, 6, 1), InvertedResidual(6, 8, 2), InvertedResidual(8, 8, 1)]
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), *blocks)
        self.last, self.classifier = nn.Conv2d(8, 16, 1), nn.Sequential(nn.Dropout(0.0), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu6(self.last(self.features(x))).mean([2, 3]))


class Branches(nn.Module):
    """Inception-like branches side by side, then squeeze and excitation over their concatenation."""

    class ConvReLU(nn.Module):
        def __init__(self, channels: int, out: int, kernel: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x), inplace=True)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = self.ConvReLU(3, 6, 1), self.ConvReLU(3, 6, 3)
        self.five = nn.Sequential(self.ConvReLU(3, 4, 1), self.ConvReLU(4, 6, 5))
        self.squeeze, self.relu = nn.Conv2d(18, 4, 1), nn.ReLU()
        self.excite, self.gate = nn.Conv2d(4, 18, 1), nn.Sigmoid()
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x), self.three(x), self.five(x)], dim=1)
        scale = self.excite(self.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head((x * self.gate(scale)).mean((2, 3)))


class ControlFlow(nn.Module):
    """torch.fx cannot trace a decision on values; every activation is a module of its own, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        if not torch.isfinite(x).all():
            raise ValueError("the input must be finite")
        return self.head(self.act2(self.conv2(x)).mean((2, 3)))


class ControlFlowOverFunctions(ControlFlow):
    """The same with a functional ReLU: neither a trace nor a swap can reach it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        if not torch.isfinite(x).all():
            raise ValueError("the input must be finite")
        return self.head(F.relu(self.conv2(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer's layer: [N, tokens, features], the activation over the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2))


class Mixer(Tokens):
    """The same habit with a module, a GELU, over [N, H, W, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1))


class Smooth(nn.Module):
    """No ReLU anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


FOREIGN: list[type[nn.Module]] = [Plain, OneReLU, Residual, Dense, Mobile, Branches]
