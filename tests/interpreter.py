"""Triton's interpreter, quicker, and rounding as a GPU does."""

import numpy as np
import pytest
import torch


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces triton.language's functions at every call of a function from a kernel: most of the time it takes.

    Here a call leaves them as the kernel's launch, or an earlier call, has set them.
    """
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch, mark = interpreter._patch_lang, "patched_by_the_interpreter"

    def once(function):
        modules = [m for m in (tl, tl.core) if any(value is m for value in function.__globals__.values())]
        if modules and all(getattr(module, mark, False) for module in modules):
            return interpreter._LangPatchScope()
        scope = patch(function)
        for module in modules:
            scope.set_attr(module, mark, True)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own conversion of float32 to bfloat16 truncates: not even an addition would agree with the reference."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    truncating = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return truncating(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
