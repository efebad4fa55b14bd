"""The label instead of the logits: a tournament over the classes, so that the client learns their argmax alone.

The state is [2, k], k values and their indices. A level takes d = left - right over ceil(k / 2) pairs and replaces them
by right + d * DReLU(d[values]): one opening and one comparison serve value and index, ceil(log2 k) levels in all.
"""

from dataclasses import replace

import torch

from deepshare.secure.errors import SecureError
from deepshare.secure.program import Program, Step


def with_label(program: Program) -> Program:
    """The program with its result, [classes] logits, replaced by the index of the largest, an integer [1].

    Among equal logits any may win. The logits themselves are truncated shares that are not opened.

    Raises:
        SecureError: the result is no vector of two classes or more.
    """
    shape = program.steps[-1].shape
    if len(shape) != 1 or shape[0] < 2:
        raise SecureError(f"secure: a label needs logits [classes], 2 or more (got a result of shape {list(shape)})")
    steps, public = list(program.steps), dict(program.public)

    def add(op: str, shape: tuple[int, ...], inputs: tuple[int, ...], index: torch.Tensor | None = None, **more) -> int:  # type: ignore[no-untyped-def]
        name = f"label.{len(steps)}"
        if index is not None:
            role = {"constant": "value", "gather": "index", "select": "pi"}[op]
            public[f"{name}.{role}"] = index
            more["public"] = {role: f"{name}.{role}"}
        steps.append(Step(op, name, inputs, shape, **more))
        return len(steps) - 1

    classes = shape[0]
    values = add("reshape", (1, classes), (len(steps) - 1,))
    indices = add("constant", (1, classes), (), torch.arange(classes))
    state, left_over = add("concat", (2, classes), (values, indices)), classes
    while left_over > 1:
        half = (left_over + 1) // 2
        first, last = torch.arange(half), torch.arange(left_over - half, left_over)  # the middle one twice, if any
        left, right = (
            add("gather", (2, half), (state,), torch.cat([part, part + left_over])) for part in (first, last)
        )
        difference = add("sub", (2, half), (left, right))
        won = add("select", (2, half), (difference,), torch.tensor([0, 0]), gates=(difference, 1), fresh=True)
        state, left_over = add("add", (2, half), (won, right)), half
    add("gather", (1,), (state,), torch.tensor([1]))
    return replace(program, steps=tuple(steps), public=public, reveals="label")
