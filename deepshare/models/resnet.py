"""ResNets for 32x32 and 64x64 images (He et al. 2015) in the forms the papers count, HybReNets among them."""

from collections.abc import Sequence

from torch import Tensor, nn

from deepshare.models.layers import conv, initialise, stem_stride, widths


class BasicBlock(nn.Module):
    """y = relu2(bn2(conv2(relu1(bn1(conv1(x))))) + shortcut(x)).

    With one convolution: relu1(bn1(conv1(x)) + shortcut(x)).
    Each ReLU is a module of its own, so that its site has a readable name.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, convs: int = 2) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.convs = convs
        if convs == 2:
            self.conv2 = conv(outputs, outputs, 3)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.relu2 = nn.ReLU()
        same = stride == 1 and inputs == outputs
        projection = (conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]
        inner = self.bn1(self.conv1(x))
        if self.convs == 1:
            return self.relu1(inner + self.shortcut(x))
        return self.relu2(self.bn2(self.conv2(self.relu1(inner))) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem of stride 1, no max pooling, stages of basic blocks, average pooling, one linear layer.

    Every stage but the first halves the image: 32, 16, 8, 4 for 32x32 and four stages. Stage s is `layer<s>`.

    Args:
        blocks: blocks per stage.
        num_classes: logits per image.
        width: channels of the stem and of the first stage.
        multipliers: channels of each further stage, as a factor of those before it; default 2 everywhere. DeepReShape's
            (alpha, beta, gamma).
        convs: 3x3 convolutions per block, 1 or 2, by stage; default 2.
        stem_relu: put a ReLU after the stem's batch norm. SNL, AutoReP and DeepShare have none there and count 491,520
            ReLUs in ResNet18 at 32x32; DeepReDuce, DeepReShape and SENet have one and count 557,056.
        in_channels: channels of the image.
        rho: 0.5 halves both sides of every feature map (the stem has stride 2).
        channels: of each stage, in place of multipliers; the stem's `width` is the first.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        num_classes: int,
        width: int = 64,
        multipliers: Sequence[int] | None = None,
        convs: Sequence[int] | None = None,
        stem_relu: bool = False,
        in_channels: int = 3,
        rho: float = 1.0,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stem_stride(rho))
        self.bn1 = nn.BatchNorm2d(width)
        self.stem_relu = nn.ReLU() if stem_relu else None
        channels = channels or widths(width, multipliers or (2,) * (len(blocks) - 1))
        inputs = width
        for stage, (outputs, count, each) in enumerate(zip(channels, blocks, convs or (2,) * len(blocks), strict=True)):
            first = BasicBlock(inputs, outputs, 1 if stage == 0 else 2, each)
            rest = (BasicBlock(outputs, outputs, 1, each) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        self._stages = len(blocks)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.bn1(self.conv1(x))
        if self.stem_relu is not None:
            x = self.stem_relu(x)
        for stage in range(self._stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.pool(x).flatten(1))
