"""One party, or provider TTP's dealer, in a process of processes.py."""

from typing import Any

from deepshare.secure.child import Signals

DEALER = 2  # its rank, with provider TTP
_LOST = ("onnection closed", "onnection reset", "roken pipe", "Socket closed", "onnection refused", "Timed out")


def work(given: dict[str, Any], signals: Signals, sockets: tuple[int, ...]) -> list[dict[str, Any]]:
    """The results of the given jobs; the dealer has none.

    Args:
        given: rank (0 the server, 1 the client, 2 the dealer), provider (CrypTen's names), jobs.

    Raises:
        ConnectionError: a connection of gloo's broke.
    """
    try:
        return _work(given["rank"], given["provider"], given["jobs"], signals)
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in _LOST):
            lost = f"party {given['rank']} lost a connection: {str(error).splitlines()[0]}"
            raise ConnectionError(lost) from error
        raise


def _work(rank: int, provider: str, jobs: list[dict[str, Any]], signals: Signals) -> list[dict[str, Any]]:
    from deepshare.secure.baseline.crypten_import import load_crypten

    signals.progress("importing CrypTen")
    crypten = load_crypten()
    crypten.cfg.mpc.provider = provider
    signals.progress("connecting")
    if rank == DEALER:
        from deepshare.secure.baseline.dealer import serve

        serve(crypten, lambda: signals.progress("dealing"))
        return []
    from deepshare.secure.baseline.inference import run_job

    crypten.init()
    results: list[dict[str, Any]] = [run_job(crypten, job, signals.progress, signals.finished) for job in jobs]
    crypten.communicator.get().barrier()
    crypten.uninit()
    return results
