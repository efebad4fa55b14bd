"""Imports go one way (docs/design.md, section 2): every edge between parts is walked, lazy ones included."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# part -> the parts it may import, itself aside. A part is a module or a package right under deepshare/.
OPERATORS = {"channel_map", "raw_ops", "packed_gates", "ops", "masked", "share", "ring"}
FOUNDATION = OPERATORS | {"nn", "files", "text_table"}
PLAN = {"site", "find", "trace", "graph", "fuse", "plan"}
BELOW_TRAIN = FOUNDATION | PLAN | {"models", "checkpoint"}
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "files": set(),
    "fold": set(),
    "text_table": set(),
    "channel_map": set(),
    "raw_ops": {"kernels"},
    "packed_gates": {"kernels"},
    "ops": {"channel_map", "raw_ops", "packed_gates"},
    "masked": {"channel_map", "raw_ops", "ops"},
    "share": {"channel_map", "raw_ops", "packed_gates"},
    "ring": {"raw_ops"},
    "nn": OPERATORS,
    "site": FOUNDATION,
    "find": FOUNDATION | {"site"},
    "trace": FOUNDATION | {"site", "find"},
    "graph": FOUNDATION | {"site", "find", "trace"},
    "fuse": FOUNDATION | {"find", "trace", "graph"},
    "plan": FOUNDATION | {"site", "find", "graph"},
    "models": FOUNDATION | PLAN,
    "checkpoint": FOUNDATION | PLAN | {"models"},
    "budget": BELOW_TRAIN,
    "methods": BELOW_TRAIN | {"budget", "fold"},
    "convert": FOUNDATION | PLAN | {"budget"},
    "data": set(),
    "train": BELOW_TRAIN | {"budget", "methods", "data", "__init__"},  # __init__ has the version
    "compare": BELOW_TRAIN | {"budget", "methods", "data", "train", "analysis"},
    "reproduce": BELOW_TRAIN | {"budget", "methods", "data", "train", "compare", "analysis"},
    "report": BELOW_TRAIN | {"train", "compare", "analysis", "reproduce"},
    "secure": BELOW_TRAIN | {"fold"},
    "analysis": BELOW_TRAIN,
    "__init__": OPERATORS | {"nn", "fuse", "plan", "budget", "convert"},
}
ON_TOP = {
    "doctor",
    "demo",
    "secure_party_cli",
    "secure_cli",
    "arguments",
    "train_cli",
    "reproduce_cli",
    "report_cli",
    "cli",
    "__main__",
}  # may import everything below, and each other downwards
TOP_ORDER = [
    "doctor",
    "demo",
    "secure_party_cli",
    "secure_cli",
    "arguments",
    "train_cli",
    "reproduce_cli",
    "report_cli",
    "cli",
    "__main__",
]
FOR_TYPES = {("analysis", "secure")}  # a comparison names the secure reports it is given
OUTSIDE = {"bench", "tests", "kernels"}  # never imported by name; kernels is reached as deepshare.kernels


class Edge(NamedTuple):
    where: str
    importer: str
    imported: str
    for_types: bool  # under `if TYPE_CHECKING:`, never run


def sources(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every Python file with its dotted name; deepshare/kernels is a symlink to kernels/ and is read there."""
    for path in sorted((root / "deepshare").rglob("*.py")):
        inside = path.relative_to(root / "deepshare")
        if inside.parts[0] != "kernels":
            yield path, ("deepshare", *inside.with_suffix("").parts)
    for path in sorted((root / "kernels").rglob("*.py")):
        yield path, ("deepshare", "kernels", *path.relative_to(root / "kernels").with_suffix("").parts)


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines of the statements under `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {
        statement.lineno
        for block in blocks
        for child in block.body
        for statement in ast.walk(child)
        if isinstance(statement, ast.stmt)
    }


def imported_names(tree: ast.Module, name: tuple[str, ...]) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """(statement, dotted name) of each import, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            package = name[: -node.level] if node.level else ()
            base = package + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                yield node, (*base, alias.name)


def edges(root: Path) -> Iterator[Edge]:
    """Edges between parts, and edges to what is never imported by name."""
    parts = {path.stem for path in (root / "deepshare").iterdir()} - {"__init__", "__pycache__"}
    for path, name in sources(root):
        importer = name[1]
        tree = ast.parse(path.read_text(), str(path))
        typing_only = type_checking_lines(tree)
        for node, target in imported_names(tree, name):
            where, for_types = f"{path.relative_to(root)}:{node.lineno}", node.lineno in typing_only
            if target[0] in OUTSIDE:
                yield Edge(where, importer, target[0], for_types)
            elif target[0] == "deepshare":
                # a name of the package itself (deepshare.ChannelMap, __version__) is an edge to __init__
                imported = target[1] if len(target) > 1 and target[1] in parts else "__init__"
                if imported != importer:
                    yield Edge(where, importer, imported, for_types)


def is_allowed(edge: Edge) -> bool:
    if edge.imported in OUTSIDE - {"kernels"} or (
        edge.imported == "kernels" and edge.importer not in ("raw_ops", "packed_gates", "doctor")
    ):
        return False
    if edge.for_types and (edge.importer, edge.imported) in FOR_TYPES:
        return True
    if edge.importer in ON_TOP:
        later = TOP_ORDER[TOP_ORDER.index(edge.importer) :]
        return edge.imported not in later
    return edge.imported in ALLOWED[edge.importer]


def violations(root: Path) -> list[str]:
    found = [edge for edge in edges(root) if not is_allowed(edge)]
    return [f"{edge.where}: {edge.importer} imports {edge.imported}" for edge in found]


def test_imports_go_one_way():
    assert violations(ROOT) == []


def names_the_dealer(root: Path, package: str) -> list[str]:
    """Imports of deepshare.secure.dealer in deepshare/secure/<package>, lazy ones included."""
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for path, name in sources(root)
        if name[1:3] == ("secure", package)
        for node, target in imported_names(ast.parse(path.read_text()), name)
        if target[:3] == ("deepshare", "secure", "dealer")
    ]


def reached(root: Path, *starts: str) -> set[str]:
    """Modules that `starts` import, at any depth and lazy ones included, with the packages they lie in."""
    found = {".".join(name).removesuffix(".__init__"): (path, name) for path, name in sources(root)}
    seen: set[str] = set()
    todo = list(starts)
    while todo:
        module = todo.pop()
        if module in seen or module not in found:
            continue
        seen.add(module)
        path, name = found[module]
        for _, target in imported_names(ast.parse(path.read_text()), name):
            todo += [".".join(target[:depth]) for depth in range(2, len(target) + 1)]
    return seen


PARTIES = ("deepshare.secure_party_cli", "deepshare.secure.net.serve", "deepshare.secure.net.query")


def test_a_party_does_not_import_the_dealer():
    assert names_the_dealer(ROOT, "engine") == []
    seen = reached(ROOT, *PARTIES)
    assert {"deepshare.secure", "deepshare.secure.net.supply", "deepshare.secure.engine.party"} <= seen
    assert [module for module in seen if module.startswith("deepshare.secure.dealer")] == []
    assert "deepshare.secure.dealer.deal" in reached(ROOT, "deepshare.secure.net.deal")


def test_a_planted_import_of_the_dealer_is_found(tmp_path: Path):
    engine = tmp_path / "deepshare" / "secure" / "engine"
    engine.mkdir(parents=True)
    (engine / "a.py").write_text("def f():\n    from ..dealer.dcf_keys import generate\n")
    (engine / "b.py").write_text("from deepshare.secure import dealer\n")
    (engine / "c.py").write_text("from deepshare.secure.engine import dcf\n")
    assert [where.split("/")[-1] for where in names_the_dealer(tmp_path, "engine")] == ["a.py:2", "b.py:1"]


def test_every_part_has_its_place():
    parts = {name[1] for _, name in sources(ROOT)}
    assert parts - ON_TOP == set(ALLOWED) & parts, "a new module must be placed in ALLOWED or ON_TOP"
    assert {"kernels", "ops", "nn", "plan", "models", "budget", "train", "secure", "data"} <= parts


def test_the_allowed_edges_have_no_circle():
    done: set[str] = set()

    def visit(part: str, above: tuple[str, ...]) -> None:
        assert part not in above, " -> ".join((*above, part))
        if part not in done:
            for below in sorted(ALLOWED[part] - (PLAN if part in PLAN else set())):
                visit(below, (*above, part))
            done.add(part)

    for part in ALLOWED:
        visit(part, ())


def test_the_walk_sees_the_real_edges():
    seen = {(edge.importer, edge.imported) for edge in edges(ROOT)}
    assert {("raw_ops", "kernels"), ("nn", "ops"), ("plan", "site"), ("train", "data"), ("__init__", "nn")} <= seen


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("kernels/planted.py", "from deepshare.ops import shared_relu", "kernels imports ops"),
        ("kernels/planted.py", "from ..ops import shared_relu", "kernels imports ops"),
        ("kernels/planted.py", "from deepshare import ChannelMap", "kernels imports __init__"),
        ("deepshare/nn.py", "def f():\n    from deepshare.plan import Plan", "nn imports plan"),
        ("deepshare/nn.py", "from . import plan", "nn imports plan"),
        ("deepshare/nn.py", "import deepshare.train.loop as loop", "nn imports train"),
        (
            "deepshare/secure/baseline/party.py",
            "class A:\n    def f(self):\n        from ...train import train",
            "secure imports train",
        ),
        ("deepshare/data/digits.py", "from deepshare.files import write_whole", "data imports files"),
        ("deepshare/analysis/a.py", "from deepshare.secure import run", "analysis imports secure"),
        ("deepshare/data/a.py", "if TYPE_CHECKING:\n    from deepshare import ops", "data imports ops"),
        ("deepshare/demo.py", "from deepshare import cli", "demo imports cli"),
        ("deepshare/train/loop.py", "import tests.conftest", "train imports tests"),
        ("deepshare/cli.py", "from bench import shapes", "cli imports bench"),
        ("deepshare/cli.py", "import kernels", "cli imports kernels"),
    ],
)
def test_a_planted_edge_is_found(tmp_path: Path, file: str, line: str, message: str):
    for part in ("plan.py", "ops.py", "cli.py", "files.py", "train/__init__.py", "secure/__init__.py"):
        (tmp_path / "deepshare" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deepshare" / part).write_text("")
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(f"import torch\n\n{line}\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")
    assert found.endswith(message)


def test_a_clean_tree_has_no_violation(tmp_path: Path):
    (tmp_path / "deepshare").mkdir()
    (tmp_path / "deepshare" / "ops.py").write_text("")
    (tmp_path / "deepshare" / "nn.py").write_text("from deepshare.ops import shared_relu\n")
    assert violations(tmp_path) == []
