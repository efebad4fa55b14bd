"""deepshare: share the gates of ReLUs for private inference. Start with README.md and docs/shared_relu.md."""

from deepshare.budget import allocate
from deepshare.channel_map import ChannelMap
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.ops import shared_relu
from deepshare.plan import Plan, apply_plan, count_drelus

__version__ = "0.1.0"

__all__ = [
    "ChannelMap",
    "MaskedReLU2d",
    "Plan",
    "SharedReLU2d",
    "allocate",
    "apply_plan",
    "count_drelus",
    "shared_relu",
]
