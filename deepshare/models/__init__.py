"""The models of the papers, by name."""

from deepshare.models.registry import MAX_WIDTH, convention, count_table, create, names
from deepshare.models.resnet import BasicBlock, ResNet

__all__ = ["MAX_WIDTH", "BasicBlock", "ResNet", "convention", "count_table", "create", "names"]
