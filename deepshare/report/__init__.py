"""Tables, figures and one self-contained page from results/ (docs/report.md)."""

from deepshare.report.errors import ReportError
from deepshare.report.write import write_report
from deepshare.report.xor_file import read_xor, write_xor

__all__ = ["ReportError", "read_xor", "write_report", "write_xor"]
