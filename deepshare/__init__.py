"""deepshare: share the gates of ReLUs for private inference. Start with README.md and docs/shared_relu.md."""

from deepshare.budget import allocate
from deepshare.channel_map import ChannelMap
from deepshare.convert import convert
from deepshare.fuse import fuse
from deepshare.masked import masked_relu
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.ops import shared_relu
from deepshare.packed_gates import PackedGates, pack_gates
from deepshare.plan import Plan, apply_plan, count_drelus
from deepshare.ring import PackedWeight, pack_weight, ring_conv2d, ring_linear
from deepshare.share import shared_relu_share

__version__ = "0.1.0"

__all__ = [
    "ChannelMap",
    "MaskedReLU2d",
    "PackedGates",
    "PackedWeight",
    "Plan",
    "SharedReLU2d",
    "allocate",
    "apply_plan",
    "convert",
    "count_drelus",
    "fuse",
    "masked_relu",
    "pack_gates",
    "pack_weight",
    "ring_conv2d",
    "ring_linear",
    "shared_relu",
    "shared_relu_share",
]
