"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_ten_lines_run_and_say_what_they_claim(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    names: dict = {}
    exec(blocks[0], names)
    assert names["y"].shape == (8, 64, 32, 32)
    assert names["plan"].drelus == 491_520
    assert capsys.readouterr().out.rstrip().endswith(" 6000")
