"""The page: one HTML file with everything in it, for a wide screen, a phone, and paper."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median

from deepshare.report.figures import Figure
from deepshare.report.gather import Gathered
from deepshare.report.tables import NONE, NOT_RUN, Table, state

_HERE = Path(__file__).parent
# Nothing is fetched, whatever a browser or an extension thinks of it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HOW = """<ul>
<li><b>ours</b>: test accuracy of the epoch that validation chose; mean over n seeds ± sample standard deviation.
<b>last epoch</b>: the same network after its last epoch, the papers' practice. The test split chooses nothing.</li>
<li><b>ours - paper</b>: in percentage points, of the chosen epoch.</li>
<li><b>DReLUs</b>: those of the network that was trained, counted; kReLUs are thousands, as the paper prints them.</li>
<li><b>commit</b>: of the source that trained; -dirty: with changes.</li>
<li>A result counts for the recipe it was trained by. Where the recipe is another by now, or was changed by
<code>--set</code>, it is stale: it is left out, and the row says so.</li>
</ul>"""


def page(
    gathered: Gathered,
    papers: Sequence[Table],
    own: Sequence[Table],
    pictures: Sequence[Figure],
    gaps: Sequence[tuple[str, str]],
) -> str:
    """The HTML page. papers, own: the tables; gaps: pictures that are not there, and what makes them."""
    sections = [
        ("not-run", "What has not been run", _not_run(gathered, gaps)),
        ("figures", "Figures", "".join(_figure(one) for one in pictures if one.number)),
        ("papers", "The papers' tables", _paper_part(gathered, papers)),
        ("own", "Experiments of our own", _own_part(own, [one for one in pictures if not one.number])),
        ("xor", "The checkerboard with one gate, seed by seed", _xor_part(gathered)),
        ("how", "How to read this", _HOW),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>\n' for name, title, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>\n{text}</section>\n' for name, title, text in shown)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>deepshare: the papers' numbers and ours</title>
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>deepshare: the papers' numbers and ours</h1>
<p>DeepShare (Bornfeld and Avidan), SNL, DeepReDuce and DeepReShape: accuracy at few DReLUs, trained again.</p>
{_counts(gathered)}
</header>
<nav aria-label="Sections">
{links}</nav>
<main>
{body}</main>
<footer>Made by <code>deepshare report</code> from the files under <code>results/</code>; it needs no other.</footer>
<script>
{(_HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _counts(gathered: Gathered) -> str:
    rows, run = gathered.published, [row for row in gathered.published if row.results]
    results = sum(len(row.results) for row in gathered.rows)
    figures = (
        (f"{len(run)} of {len(rows)}", "rows of the papers' tables run"),
        (str(len(rows) - len(run)), "rows not run"),
        (str(results), "training runs in all"),
    )
    return "<ul class=counts>" + "".join(f"<li><b>{value}</b>{escape(text)}</li>" for value, text in figures) + "</ul>"


def _not_run(gathered: Gathered, gaps: Iterable[tuple[str, str]]) -> str:
    """Recipes without a result by table, and pictures without data."""
    lines = []
    for group in gathered.papers:
        names = [row.name for row in group.rows if not row.results]
        if names:
            codes = ", ".join(f"<code>{escape(name)}</code>" for name in names)
            lines.append(f"<li>{escape(group.title)}: {len(names)} of {len(group.rows)} rows: {codes}</li>")
    lines += [f"<li>{escape(name)}: needs {escape(what)}</li>" for name, what in gaps]
    if not lines:
        return "<p>Every row that has a recipe, and every figure, has been run.</p>"
    how = "<p><code>deepshare reproduce NAME --seeds 3</code> runs a row; then <code>deepshare report</code>.</p>"
    return f"<ul>{''.join(lines)}</ul>{how}"


def _paper_part(gathered: Gathered, tables: Sequence[Table]) -> str:
    parts = []
    for group, table in zip(gathered.papers, tables, strict=True):
        parts.append(f"<h3>{escape(table.title)}</h3><p class=state>{state(group)}</p>{_table(table)}")
    return "".join(parts)


def _own_part(tables: Sequence[Table], pictures: Sequence[Figure]) -> str:
    if not tables:
        return ""
    about = (
        "<p>Recipes for no row of a paper, as smaller networks and fewer images: nothing published is beside them.</p>"
    )
    by_title = {one.title: _figure(one) for one in pictures}
    return about + "".join(f"<h3>{escape(one.title)}</h3>{by_title.get(one.title, '')}{_table(one)}" for one in tables)


def _xor_part(gathered: Gathered) -> str:
    if gathered.xor is None:
        return ""
    found = gathered.xor.xor
    header = ("network", "solved", "best %", "median %", *(f"seed {seed}" for seed in found.seeds))
    rows = []
    for method in found.methods:
        reached = method.accuracies
        figures = [f"{100 * value:.1f}" for value in (max(reached), median(reached), *reached)]
        rows.append((method.name, f"{method.solved} of {len(found.seeds)}", *figures))
    about = f"<p>Share of the square that is labelled right; solved: above {100 * found.solved_above:.0f} %.</p>"
    return about + _table(Table("xor", "xor", header, tuple(rows), 1))


def _table(table: Table) -> str:
    """A table in a frame of its own, which scrolls where the screen is narrower."""
    head = "".join(f"<th scope=col{_left(place, table)}>{escape(text)}</th>" for place, text in enumerate(table.header))
    rows = "".join(
        "<tr>" + "".join(_cell(place, text, table) for place, text in enumerate(row)) + "</tr>\n" for row in table.rows
    )
    label = escape(table.title)
    return (
        f'<div class=wide tabindex=0 role=region aria-label="{label}"><table id="table-{table.name}">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _cell(place: int, text: str, table: Table) -> str:
    kinds = ["left"] if _left(place, table) else []
    kinds += ["notrun"] if text.startswith(NOT_RUN) else ["missing"] if text == NONE else []
    return f'<td class="{" ".join(kinds)}">{escape(text)}</td>' if kinds else f"<td>{escape(text)}</td>"


def _left(place: int, table: Table) -> str:
    text = place < table.left or table.header[place] in ("commit", "machine", "by seed %")
    return " class=left" if text else ""


def _figure(one: Figure) -> str:
    data = base64.b64encode(one.content).decode("ascii")
    width, height = (int.from_bytes(one.content[at : at + 4], "big") for at in (16, 20))
    title = f"<h3>{escape(one.number)}: {escape(one.title)}</h3>" if one.number else ""
    image = f'<img src="data:image/png;base64,{data}" width={width} height={height} alt="{escape(one.description)}">'
    caption = f"<figcaption>{escape(one.caption)}</figcaption>"
    return f'<figure id="{one.name}">{title}<div class=picture>{image}</div>{caption}</figure>\n'
