"""The server's queue: one query is served at a time, a stated number waits, more are refused."""

import threading

from deepshare.secure.errors import SecureError
from deepshare.secure.net.connect import Party
from deepshare.secure.net.session import Log, Session


class Waiting:
    """Sessions in the order they came. Each is told its place (1: the next) with the beats.

    Args:
        bound: how many may wait beside the one that is served.
    """

    def __init__(self, bound: int, log: Log) -> None:
        if bound < 0:
            raise SecureError(f"secure: --queue must be at least 0 (got {bound})")
        self._bound, self._log = bound, log
        self._sessions: list[Session] = []
        self._serving = False
        self._closed: str | None = None
        self._changed = threading.Condition()

    def admit(self, party: Party) -> None:
        """Raises SecureError if as many wait as may."""
        with self._changed:
            self._drop_the_dead()
            if len(self._sessions) + self._serving > self._bound:
                waiting = len(self._sessions)
                raise SecureError(f"secure: busy: a query is served and {waiting} wait, the most that may (--queue)")

    def add(self, session: Session) -> None:
        self._log(f"connected: {session.party.name}")
        with self._changed:
            if self._closed is not None:  # between being admitted and standing here
                session.close(self._closed)
                return
            self._sessions.append(session)
            self._tell_places()
            self._changed.notify()

    def next(self, seconds: float) -> Session | None:
        """The next living session, None if there is none within `seconds`. `done` must follow."""
        with self._changed:
            self._drop_the_dead()
            if not self._sessions:
                self._changed.wait(seconds)
            if not self._sessions:
                return None
            session = self._sessions.pop(0)
            session.beats.note = {"place": 0}
            self._serving = True
            self._tell_places()
            return session

    def __len__(self) -> int:
        with self._changed:
            self._drop_the_dead()
            return len(self._sessions)

    def done(self) -> None:
        with self._changed:
            self._serving = False

    def close(self, why: str) -> None:
        """Ends all that wait, and who still comes, with `why` as last words."""
        with self._changed:
            self._closed = why
            for session in self._sessions:
                session.close(why)
            self._sessions.clear()

    def _drop_the_dead(self) -> None:
        for session in [session for session in self._sessions if not session.beats.alive]:
            self._sessions.remove(session)
            self._log(f"gone before its turn: {session.party.name}")
            session.close()
        self._tell_places()

    def _tell_places(self) -> None:
        for place, session in enumerate(self._sessions, 1):
            session.beats.note = {"place": place}
