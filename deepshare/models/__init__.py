"""The models of the papers, by name."""

from deepshare.models.registry import convention, count_table, create, names
from deepshare.models.resnet import BasicBlock, ResNet

__all__ = ["BasicBlock", "ResNet", "convention", "count_table", "create", "names"]
