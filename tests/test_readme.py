"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

from deepshare import count_drelus

README = Path(__file__).resolve().parents[1] / "README.md"


def run_block(number: int) -> dict:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[number], names)
    return names


def test_the_ten_lines_run_and_say_what_they_claim(capsys: pytest.CaptureFixture[str]):
    names = run_block(0)
    assert names["y"].shape == (8, 64, 32, 32)
    assert names["plan"].drelus == 491_520
    assert capsys.readouterr().out.rstrip().endswith(" 6000")


def test_a_network_of_ones_own_gets_the_count_it_claims(capsys: pytest.CaptureFixture[str]):
    names = run_block(1)
    printed = capsys.readouterr().out
    assert count_drelus(names["network"], (3, 32, 32)).total == 262_144
    assert count_drelus(names["shared"], (3, 32, 32)).total == 12_288
    assert "12,288" in printed
    assert printed.count(" of 1") == 3  # followers of the ReLU at "1"
    assert "P=12" in printed
