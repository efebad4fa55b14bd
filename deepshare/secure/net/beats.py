"""Signs of life: a second connection between two processes, on which each says once a second that it lives.

A thread of its own beats, so that a process that computes for long still does; one that is stopped, killed or cut off
does not. When nothing came for SILENCE_SECONDS, or the connection ends, the peer is gone, and whoever waits on the
data channel is told within a tick. Who ends says why (its last words), so that the survivors name the culprit.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from deepshare.secure.errors import SecureError
from deepshare.secure.net import messages
from deepshare.secure.net.channel import TICK_SECONDS, Channel

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 6.0
# A gap this long between two rounds of our own loop means that this process was stopped, not that the peer is silent.
OWN_PAUSE_SECONDS = 2.0
LAST_WORDS_SECONDS = 1.0  # the data connection may end a moment before the last words have come
STUCK_BEATS = 5  # so often in a row both wait and nothing is on the way: they wait for each other


class _OwnChannel:
    """The watch of the beats' own connection: that it ends without last words is all there is to say."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def check(self) -> None:
        pass

    def lost(self, how: str) -> SecureError:
        return SecureError(f"secure: {self._peer} is gone without a word (killed?): it {how}")


class Beats:
    """Beats over `channel` about the peer of `data`; a Watch.

    Attributes:
        note: numbers that go out with every beat, such as a client's place in the queue.
        on_note: called in the beating thread with each note that came.
    """

    def __init__(
        self, channel: Channel, data: Channel, *, on_note: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.note: dict[str, int] = {}
        self.on_note = on_note
        self.peer = data.peer
        self._channel, self._data = channel, data
        self._failure: str | None = None
        self._gone, self._closing, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._last_words = ""
        self._stuck = 0
        self._wake_reading, self._wake_writing = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"beats {self.peer}", daemon=True)
        channel.watch, data.watch, data.deadline = _OwnChannel(self.peer), self, None
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._failure is None

    def check(self) -> None:
        """Raises SecureError if the peer is gone."""
        if self._failure is not None:
            raise SecureError(self._failure)

    def lost(self, how: str) -> SecureError:
        """The error for a data connection that ended as `how` says: the peer's last words if they come soon."""
        self._gone.wait(LAST_WORDS_SECONDS)
        return SecureError(self._failure or f"secure: {self.peer} {how}")

    def close(self, why: str = "") -> None:
        """Ends the beats with last words; '' means that all is done. Both connections are closed."""
        with self._ending:
            if self._closing.is_set():
                return
            self._last_words = why.removeprefix("secure: ")
            self._closing.set()
            os.write(self._wake_writing, b"x")
            self._thread.join()
            self._data.watch = None
            self._data.close()
            os.close(self._wake_reading)
            os.close(self._wake_writing)

    def _run(self) -> None:
        try:
            self._beat_until_closed()
            if not self._gone.is_set():
                messages.send(self._channel, "bye", why=self._last_words)
                self._channel.finish(LAST_WORDS_SECONDS)
        except SecureError as error:  # of the channel: the peer is gone
            self._fail(str(error))
        finally:
            self._channel.close()

    def _beat_until_closed(self) -> None:
        heard = looked = time.monotonic()
        due = 0.0
        while not self._closing.is_set() and not self._gone.is_set():
            now = time.monotonic()
            if now - looked > OWN_PAUSE_SECONDS:
                heard += now - looked
            looked = now
            self._channel.deadline = heard + SILENCE_SECONDS
            if now >= due:
                self._send_beat()
                due = now + BEAT_SECONDS
            if self._channel.readable(min(due - now, TICK_SECONDS), self._wake_reading):
                self._take()
                heard = time.monotonic()
            elif now - heard > SILENCE_SECONDS:
                silence = f"gave no sign of life for {now - heard:.1f} s (stopped, or the network is cut)"
                messages.send(self._channel, "bye", why="it heard nothing from this process (stopped for a while?)")
                self._fail(f"secure: {self.peer} {silence}")

    def _send_beat(self) -> None:
        data = self._data
        messages.send(self._channel, "beat", waits=data.waiting, sent=data.sent, arrived=data.arrived, note=self.note)

    def _take(self) -> None:
        kind, content = messages.receive(self._channel, "beat", "bye")
        if kind == "bye":
            why = messages.text(self._channel, content, "why")
            self._fail(f"secure: {self.peer} ended: {why}" if why else f"secure: {self.peer} ended the session")
            return
        self._look_for_a_deadlock(content)
        if self.on_note is not None and isinstance(content.get("note"), dict):
            self.on_note(content["note"])

    def _look_for_a_deadlock(self, beat: dict[str, Any]) -> None:
        """Two parties that disagree about what comes next both wait, with nothing on the way."""
        data = self._data
        waits = bool(beat.get("waits")) and data.waiting
        nothing_on_the_way = (beat.get("sent"), beat.get("arrived")) == (data.arrived, data.sent)
        self._stuck = self._stuck + 1 if waits and nothing_on_the_way else 0
        if self._stuck >= STUCK_BEATS:
            self._fail(f"secure: {self.peer} and this process wait for each other: one expects bytes the other has not")

    def _fail(self, why: str) -> None:
        if self._failure is None:
            self._failure = why
        self._gone.set()
