"""Results in, report out."""

from pathlib import Path

from deepshare.analysis.drawing import check_can_draw
from deepshare.files import write_whole
from deepshare.report.errors import ReportError
from deepshare.report.figures import figures, missing
from deepshare.report.gather import gather
from deepshare.report.page import page
from deepshare.report.tables import own_tables, paper_tables

INDEX = "index.html"


def write_report(results: Path, out: Path) -> Path:
    """out/index.html and a PNG a figure, from what lies under `results`. What has not been run is in it as well.

    Raises:
        DrawingError: matplotlib is missing. ReportError: results/xor.json is damaged. ReproduceError: a result is.
            OSError: `out` cannot be written. All before anything is.
    """
    check_can_draw()
    if not results.is_dir():
        raise ReportError(f"{results}: wanted the folder of results (deepshare reproduce writes it), there is none")
    gathered = gather(results)
    pictures = figures(gathered)
    tables = paper_tables(gathered), own_tables(gathered)
    text = page(gathered, *tables, pictures, list(missing(gathered)))
    out.mkdir(parents=True, exist_ok=True)
    for one in pictures:
        write_whole(out / f"{one.name}.png", one.content)
    return write_whole(out / INDEX, text)
