"""VGG16 with batch norm for 32x32 images (Simonyan and Zisserman 2014)."""

from torch import Tensor, nn

from deepshare.models.layers import conv_bn_relu, initialise, stem_stride

BLOCKS = (2, 2, 3, 3, 3)  # convolutions per stage
MULTIPLIERS = (2, 2, 2, 1)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, the image halved between them, average pooling, one or three linear layers.

    The pooling is by averages: VGG's maxima compare values under encryption, which no ReLU count shows. At 32x32 the
    last stage is 2x2 and is averaged to one vector. Stage s is `layer<s>`. There is no stem apart from the stages.

    Args:
        channels: per stage, (64, 128, 256, 512, 512) as published.
        hidden: channels of the two hidden linear layers, 0 for none. VGG16's are 4,096: 284,672 ReLUs at 32x32
            (DeepReShape, Table 3), 276,480 without.
        num_classes: logits per image.
        in_channels: channels of the image.
        rho: 0.5 halves both sides of every feature map (the first convolution has stride 2).
    """

    def __init__(
        self, channels: list[int], hidden: int, *, num_classes: int, in_channels: int = 3, rho: float = 1.0
    ) -> None:
        super().__init__()
        inputs, stride = in_channels, stem_stride(rho)
        for stage, (outputs, count) in enumerate(zip(channels, BLOCKS, strict=True)):
            layer = nn.Sequential(conv_bn_relu(inputs, outputs, 3, stride))
            layer.extend(conv_bn_relu(outputs, outputs, 3) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", layer)
            inputs, stride = outputs, 1
        self.halve = nn.AvgPool2d(2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential()
        for number in (1, 2) if hidden else ():
            self.head.add_module(f"fc{number}", nn.Linear(inputs, hidden))
            self.head.add_module(f"relu{number}", nn.ReLU())
            inputs = hidden
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        for stage in range(len(BLOCKS)):
            x = getattr(self, f"layer{stage + 1}")(x if stage == 0 else self.halve(x))
        return self.fc(self.head(self.pool(x).flatten(1)))
