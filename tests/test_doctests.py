"""Examples in docstrings compute what they print."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "deepshare").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8") and "kernels" not in path.parts
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
