"""What a secure run measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from deepshare.files import write_whole

PROVIDER_NOTES = {
    "TFP": "stand-in dealer: party 0 makes the triples and knows them all",
    "TTP": "dealer apart, in a process of its own; CrypTen's generators take seeds of 32 bits",
}


@dataclass(frozen=True)
class SiteCost:
    """One operation of the network: comparisons for one image; rounds, and bytes a party sends, for one batch."""

    name: str
    op: str
    drelus: int
    rounds: int
    bytes_one_way: int


@dataclass(frozen=True)
class SecureReport:
    """Costs and results of a two-party run. Rounds and bytes are counted, exact, and for one full batch.

    Attributes:
        network: name of what was run; weights: public (both parties know them) or secret (only the server).
        convention: which ReLUs count, with or without a stem's.
        provider: TFP (party 0 makes the triples and knows them: a stand-in) or TTP (a third process does).
        device, transport: what the figures were made with.
        batch: images per inference; images: how many were run in all.
        drelus: comparisons for one image, those of max pooling among them.
        rounds; server_bytes, client_bytes: what each party sends; dealer_bytes: what the dealer sent before (0: TFP).
        predicted_rounds, predicted_bytes: the same (bytes of both together) from costs.py's formulas.
        seconds_online: median over the full batches, at the client, from its input to its logits, material dealt
            beforehand.
        seconds_dealing: median time that dealing takes for one batch.
        agreement: share of images with the same argmax as plain PyTorch.
        accuracy_secure, accuracy_plain: on these images.
        sites: one row per operation, in order; the last is the opening of the logits to the client.
    """

    network: str
    convention: str
    weights: str
    provider: str
    device: str
    transport: str
    batch: int
    images: int
    drelus: int
    rounds: int
    server_bytes: int
    client_bytes: int
    dealer_bytes: int
    predicted_rounds: int
    predicted_bytes: int
    seconds_online: float
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
            f"  weights {self.weights}, provider {self.provider} ({self.provider_note})\n"
            f"  {self.device}, {self.transport}, batch {self.batch}, {self.images} images\n"
        )
        return head + _sites_table(self) + _summary(self)


def _sites_table(report: SecureReport) -> str:
    shown = [site for site in report.sites if site.rounds or site.drelus]
    width = max([len("operation"), *(len(site.name) for site in shown)])
    lines = [f"  {'operation':<{width}} {'kind':<8} {'DReLUs/img':>10} {'rounds':>6} {'kB one way':>12}"]
    for site in shown:
        kilobytes = site.bytes_one_way / 1e3
        lines.append(f"  {site.name:<{width}} {site.op:<8} {site.drelus:>10,} {site.rounds:>6} {kilobytes:>12,.1f}")
    total_kb = max(report.server_bytes, report.client_bytes) / 1e3
    lines.append(f"  {'total':<{width}} {'':<8} {report.drelus:>10,} {report.rounds:>6} {total_kb:>12,.1f}")
    return "\n".join(lines) + "\n"


def _summary(report: SecureReport) -> str:
    return (
        f"  per batch: {report.rounds} rounds, {report.megabytes:.3f} MB one way, {report.seconds_online:.3f} s online "
        f"(+ {report.seconds_dealing:.3f} s dealing, {report.dealer_bytes / 1e6:.3f} MB from the dealer)\n"
        f"  argmax equal to plain PyTorch on {report.agreement:.1%} of the images; "
        f"accuracy {report.accuracy_secure:.1%} secure, {report.accuracy_plain:.1%} plain"
    )
