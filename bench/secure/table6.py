"""Cells to tables: the seven rows beside the published column, then every cell with what it was made with."""

from collections.abc import Mapping, Sequence

from deepshare.text_table import markdown
from secure.cells import SYSTEMS, WEIGHTS, Cell, Found
from secure.links import Link
from secure.networks import Network

NAMES = {"crypten": "CrypTen", "engine-tree": "engine, tree", "engine-dcf": "engine, DCF"}
NOTES = """\
Weights untrained: latency does not depend on their values. Batch 1, one core a party, seconds **online**: at the
client, from its image to its logits, material dealt beforehand; the median, in brackets the least. *x own*: the same
system's all-ReLU seconds over these; *x CrypTen*: CrypTen's all-ReLU seconds, same weights and link, over these.
Published: DeepShare's Table 6, which names neither weights setting, provider, batch nor seconds."""
Cells = Mapping[Cell, Found]
Refused = Mapping[Cell, str | None]  # why a cell was not run


def report(found: Cells, refused: Refused, networks: Sequence[Network], links: Sequence[Link]) -> str:
    """Markdown: a table for each link and weights setting, then the table of all cells, and why some were not run."""
    parts = [NOTES]
    for link in links:
        for weights in WEIGHTS:
            if any(cell.link == link and cell.weights == weights for cell in found):
                parts.append(f"## {link.words}, {weights} weights\n\n{_speedups(found, networks, weights, link)}")
    parts.append(f"## Every cell\n\n{_all_cells(found)}")
    reasons = [f"- {cell.slug}: {reason}" for cell, reason in refused.items() if reason is not None]
    if reasons:
        parts.append("Not run:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _speedups(found: Cells, networks: Sequence[Network], weights: str, link: Link) -> str:
    here = [system for system in SYSTEMS if any(c.system == system and c.link == link for c in found)]
    columns = [f"{NAMES[system]} {what}" for system in here for what in _columns(system)]
    rows = []
    for network in networks:
        published = "-" if network.published is None else f"{network.published:.2f}"
        cells = [text for system in here for text in _speedup(found, Cell(network, system, weights, link))]
        rows.append((network.name, published, *cells))
    return markdown(("network, DReLUs", "published", *columns), rows)


def _columns(system: str) -> tuple[str, ...]:
    return ("s", "x own") if system == "crypten" else ("s", "x own", "x CrypTen")


def _speedup(found: Cells, cell: Cell) -> tuple[str, ...]:
    """Seconds, the least in brackets, and the two ratios; a dash where a cell was not measured."""
    if cell not in found:
        return ("-",) * len(_columns(cell.system))
    seconds = found[cell].seconds
    baselines = [Cell(cell.network.all_relu(), system, cell.weights, cell.link) for system in (cell.system, "crypten")]
    ratios = [f"{found[base].seconds / seconds:.2f}" if base in found else "-" for base in baselines]
    return (f"{seconds:.3f} ({min(found[cell].online):.3f})", *ratios[: len(_columns(cell.system)) - 1])


def _all_cells(found: Cells) -> str:
    header = ("network", "DReLUs", "system", "weights", "dealer", "batch", "device", "link", "rounds", "flights")
    header = (*header, "MB to client", "MB to server", "online s", "least - most", "runs", "preparing s", "dealing s")
    header = (*header, "MB before the image", "MB dealt to server, client", "MB once a model", "total s")
    header = (*header, "worst logit error", "of", "load")
    return markdown(header, [_row(cell, figures) for cell, figures in found.items()])


def _row(cell: Cell, found: Found) -> tuple[str, ...]:
    online, offline = found.online, [size / 1e6 for size in found["offline_bytes"]]
    loads = [visit["load_1"] for visit in found.visits]
    return (
        cell.network.name,
        f"{found['drelus']:,}",
        NAMES[cell.system],
        cell.weights,
        found["provider"],
        str(found["batch"]),
        found["device"],
        cell.link.words,
        str(found["rounds"]),
        str(found["flights"]),
        f"{found['server_bytes'] / 1e6:.3f}",
        f"{found['client_bytes'] / 1e6:.3f}",
        f"{found.seconds:.3f}",
        f"{min(online):.3f} - {max(online):.3f}",
        str(len(online)),
        f"{found.preparing:.3f}",
        f"{found.dealing:.3f}",
        f"{found['early_bytes'] / 1e6:.1f}",
        f"{offline[0]:.1f}, {offline[1]:.1f}",
        f"{found['setup_bytes'] / 1e6:.1f}",
        f"{_total(cell, found):.3f}",
        f"{max(visit['worst_error'] for visit in found.visits):.1e}",
        f"{found['logit_range']:.2g}",
        f"{min(loads):.1f} - {max(loads):.1f}",
    )


def _total(cell: Cell, found: Found) -> float:
    """Dealing, the larger ticket's way at the link's rate (computed; loopback: free), preparing, online."""
    rate = None if cell.link.megabits is None else cell.link.megabits * 1e6 / 8
    download = max(found["offline_bytes"]) / rate if rate else 0.0
    return found.dealing + download + found.preparing + found.seconds
