"""The models of the papers, by name."""

from deepshare.models.registry import (
    MAX_WIDTH,
    convention,
    count_table,
    create,
    default_width,
    describe,
    is_name,
    known,
    names,
    patterns,
    shape_of,
    shapes_only,
    width_of,
)
from deepshare.models.resnet import BasicBlock, ResNet
from deepshare.models.stages import HEAD, STEM, stage_names, stage_of, stages

__all__ = [
    "HEAD",
    "MAX_WIDTH",
    "STEM",
    "BasicBlock",
    "ResNet",
    "convention",
    "count_table",
    "create",
    "default_width",
    "describe",
    "is_name",
    "known",
    "names",
    "patterns",
    "shape_of",
    "shapes_only",
    "stage_names",
    "stage_of",
    "stages",
    "width_of",
]
