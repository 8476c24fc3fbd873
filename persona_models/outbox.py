"""The events of the model's thread on their way to the callers' event loops: a few at a time, not one by one. Knows nothing of models or batches."""

from __future__ import annotations

import asyncio
import time

from persona_models.answer import Answer, Outcome, joined

# Events leave together, at most this often and at most so many a second of all rows: every one costs a wake-up here, a hop between processes and a
# write to a client, and with one a token a small model on two cores would spend more time on them than on its answers.
SEND_EVERY_S = 0.01
MAX_EVENTS_PER_S = 200


class Outbox:
    """What is to be sent; used by one thread."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Answer, Outcome]] = []
        self._last_s = 0.0

    def put(self, row: Answer, event: Outcome) -> None:
        self._waiting.append((row, event))

    def send(self, rows: int) -> None:
        """Hand over what is due while so many rows are in flight: everything after a while, or where there are none; at once the events of answers that
        begin or end."""
        now = time.monotonic()
        if not rows or now - self._last_s >= max(SEND_EVERY_S, rows / MAX_EVENTS_PER_S):
            self._last_s = now
            self.flush()
        elif at_once := {row for row, e in self._waiting if isinstance(e, BaseException) or e.finish_reason or e.completion_tokens == 1}:
            later = [(row, e) for row, e in self._waiting if row not in at_once]
            self._waiting = [(row, e) for row, e in self._waiting if row in at_once]
            self.flush()
            self._waiting = later

    def flush(self) -> None:
        """Hand over everything, the events of a row as one, in one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[Answer, list[Outcome]]] = {}
        for row, event in self._waiting:
            by_loop.setdefault(row.loop, {}).setdefault(row, []).append(event)
        self._waiting = []
        for loop, sent in by_loop.items():
            # The caller's loop may be gone with the caller; then nobody waits for the event.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, [(row, event) for row, events in sent.items() for event in joined(events)])


def _deliver(sent: list[tuple[Answer, Outcome]]) -> None:
    for row, event in sent:
        row.events.put_nowait(event)
