"""What a secure run measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent

from deepshare.files import write_whole
from deepshare.text_table import aligned

PROVIDER_NOTES = {
    "dealer": "a process of its own, given the program and no weight",
    "TFP": "stand-in dealer: party 0 makes the triples and knows them all",
    "TTP": "dealer apart, in a process of its own; CrypTen's generators take seeds of 32 bits",
}


@dataclass(frozen=True)
class SiteCost:
    """One operation of the network: comparisons for one image; for one batch rounds, and bytes the busier party sends.

    Of the engine also: bytes of material; median seconds at the client, and of them waiting for the server.
    """

    name: str
    op: str
    drelus: int
    rounds: int
    bytes_one_way: int
    bytes_dealt: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0


@dataclass(frozen=True)
class SecureReport:
    """Costs and results of a two-party run. Rounds and bytes are counted, exact, and for one full batch.

    Attributes:
        network: name of what was run; weights: public (both parties know them) or secret (only the server).
        convention: which ReLUs count, with or without a stem's.
        engine: whose protocol, and with which gates.
        provider: "dealer", the engine's; CrypTen's TFP (party 0 makes the triples and knows them: a stand-in) or TTP (a
            third process does).
        device, transport: what the figures were made with.
        batch: images per inference; images: how many were run in all.
        drelus: comparisons for one image, those of max pooling among them.
        rounds: openings one after another; flights: messages on the longest chain, each half a round trip.
        server_bytes, client_bytes: what each party sends; early_bytes: what the client sends before its input is there;
            dealer_bytes: what the dealer sent before (0: TFP); setup_bytes: masked weights, once a model version.
        predicted_rounds, predicted_bytes: the same (bytes of both together) from costs.py's formulas.
        seconds_online: median over the full batches, at the client, from its input to its logits, material dealt
            beforehand.
        seconds_preparing: median time of the slower party from its material to readiness for the input.
        seconds_dealing: median time that dealing takes for one batch.
        agreement: share of images with the same argmax as plain PyTorch.
        accuracy_secure, accuracy_plain: on these images.
        sites: one row per operation, in order; the last is the opening of the logits to the client.
    """

    network: str
    convention: str
    engine: str
    weights: str
    provider: str
    device: str
    transport: str
    batch: int
    images: int
    drelus: int
    rounds: int
    flights: int
    server_bytes: int
    client_bytes: int
    early_bytes: int
    dealer_bytes: int
    setup_bytes: int
    predicted_rounds: int
    predicted_bytes: int
    seconds_online: float
    seconds_preparing: float
    seconds_dealing: float
    agreement: float
    accuracy_secure: float
    accuracy_plain: float
    sites: tuple[SiteCost, ...]

    @property
    def megabytes(self) -> float:
        """MB (10^6 bytes) the busier party sends for one batch."""
        return max(self.server_bytes, self.client_bytes) / 1e6

    @property
    def provider_note(self) -> str:
        return PROVIDER_NOTES[self.provider]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "megabytes": self.megabytes, "provider_note": self.provider_note}, indent=2)

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    def __str__(self) -> str:
        head = (
            f"secure inference of {self.network}, ReLUs: {self.convention}\n"
            f"  {self.engine}; weights {self.weights}, provider {self.provider} ({self.provider_note})\n"
            f"  {self.device}, {self.transport}, batch {self.batch}, {self.images} images\n"
        )
        return head + _sites_table(self) + _summary(self)


def _sites_table(report: SecureReport) -> str:
    shown = [site for site in report.sites if site.rounds or site.drelus or site.bytes_dealt]
    rows: list[tuple[str, ...]] = [_HEADER, ()]
    for site in shown:
        sent, dealt = f"{site.bytes_one_way / 1e3:,.1f}", f"{site.bytes_dealt / 1e3:,.1f}"
        seconds = (f"{1e3 * site.seconds:.2f}", f"{1e3 * site.seconds_waiting:.2f}")
        rows.append((site.name, site.op, f"{site.drelus:,}", str(site.rounds), sent, dealt, *seconds))
    total_kb = f"{max(report.server_bytes, report.client_bytes) / 1e3:,.1f}"
    dealt_kb, seconds_ms = f"{report.dealer_bytes / 1e3:,.1f}", f"{1e3 * report.seconds_online:.2f}"
    rows.append(("total", "", f"{report.drelus:,}", str(report.rounds), total_kb, dealt_kb, seconds_ms, ""))
    columns = len(_HEADER) if report.engine.startswith("deepshare") else 5  # CrypTen says nothing of the others by step
    return indent(aligned([row[:columns] for row in rows], left=2), "  ") + "\n"


_HEADER = ("operation", "kind", "DReLUs/img", "rounds", "kB one way", "kB dealt", "ms", "of them waiting")


def _summary(report: SecureReport) -> str:
    return (
        f"  per batch: {report.rounds} rounds ({report.flights} flights), {report.megabytes:.3f} MB one way, "
        f"{report.seconds_online:.3f} s online\n"
        f"  before: {report.dealer_bytes / 1e6:.3f} MB from the dealer, {report.early_bytes / 1e6:.3f} MB "
        f"from the client, {report.seconds_dealing:.3f} s dealing, {report.seconds_preparing:.3f} s preparing; "
        f"once a model: {report.setup_bytes / 1e6:.1f} MB\n"
        f"  argmax equal to plain PyTorch on {report.agreement:.1%} of the images; "
        f"accuracy {report.accuracy_secure:.1%} secure, {report.accuracy_plain:.1%} plain"
    )
