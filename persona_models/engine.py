"""Continuous batching over one base and many adapters: requests in, token events out.

One thread owns the model. Between two steps it takes cancellations and new adapters, admits waiting requests and reads their prompts, no more at a time
than a chunk, so that the others keep streaming; then it runs one decode step over all rows. A row keeps the adapter versions it began with.
Knows nothing of HTTP, Ray or MLflow.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from persona_models import sampling
from persona_models.adapters import Adapter
from persona_models.answer import Answer, check_request, joined
from persona_models.base_model import BaseModel
from persona_models.decoder import make_decoder
from persona_models.errors import NotReadyError, QueueFullError, UnknownModelError, WorkError
from persona_models.gated_lora import LoraBank, Merge
from persona_models.gpu import give_back
from persona_models.lookup import Lookup, Phrases, Said, guesses
from persona_models.outbox import Outbox
from persona_models.prefixes import BLOCK_TOKENS, Prefixes
from persona_models.prompt import fit_prompt
from persona_models.protocol import EngineStatus, GenerateRequest, TokenEvent
from persona_models.slots import AdapterSlots

# Prompt tokens that are read between two decode steps, of one request or of several: on a CPU about as long as ten of them, and a GPU reads many in the
# time of one. A request counts as LEAST_TOKENS at least.
CHUNK_TOKENS, GPU_CHUNK_TOKENS, LEAST_TOKENS = 256, 4096, 32
# Tokens of a known beginning that are copied in the time of one that is read.
RECALLED = 4
# Prompts that an engine reads before the first request, as long as one takes no more than this.
WARM_UP_TOKENS, WARM_UP_S = (2, 32, 240), 0.2
CLOSING = "the engine is shutting down; try again shortly"


@dataclass(eq=False)
class _Work:
    """Something to do between two steps; `alone` waits until no row is in flight."""

    do: Callable[[], None]
    alone: bool = False
    done: Future[None] = field(default_factory=Future)


class PersonaEngine:
    """An Engine over a loaded base.

    manners: the personas' system prompts, for bases that read system messages. merged: the one persona of a dedicated engine, whose adapter is added to
    the base's own weights instead of gated beside them; the engine then answers for nobody else. prefix_mb: megabytes of keys and values that are kept
    of prompts already read, for those that begin alike; 0: none. guess: whether several tokens are tried in one step, see lookup.py. said: what
    is remembered of its answers, to guess others'.

    threads: torch threads of the model's thread on a CPU, by default as many as of the caller's. While another thread of the process keeps OpenMP
    threads of its own, GNU's OpenMP waits by sleeping and not by spinning, and a step takes three times as long: load a model with
    `torch.set_num_threads(1)` where it is to be served.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        manners: Mapping[str, str] | None = None,
        max_rows: int = 16,
        max_queue: int = 64,
        merged: str | None = None,
        prefix_mb: int = 256,
        guess: bool = True,
        said: Said | None = None,
        threads: int | None = None,
    ) -> None:
        self.base = base
        self.manners = dict(manners or {})
        self.max_rows, self.max_queue, self.merged = max_rows, max_queue, merged
        self._guess, self._said = guess, said or Said()
        self._bank = LoraBank(base.model)
        self._merge = Merge(base.model) if merged else None
        self._prefix_bytes = prefix_mb * 2**20
        self._chunk = CHUNK_TOKENS if base.device.type == "cpu" else GPU_CHUNK_TOKENS
        self._make_decoder()
        self._slots = AdapterSlots(self._bank)
        # Of a dedicated engine, which has no slots: the persona's one version.
        self._merged_version: dict[str, str] = {}
        self._merged_phrases = Phrases()
        self._loading: dict[tuple[str, str], Future[None]] = {}
        self._waiting: deque[Answer] = deque()
        self._work: deque[_Work] = deque()
        # Rows by their place in the decoder; the last one may still be reading its prompt.
        self._rows: list[Answer] = []
        self._outbox = Outbox()
        self._wake = threading.Condition()
        self._closing = False
        self._broken: str | None = None
        self._threads = threads or torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="persona-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------------------------------------------------

    def load_adapter(self, persona: str, adapter: Adapter | Callable[[], Adapter], version: str, *, current: bool = True) -> None:
        """Make `version` the persona's adapter for rows admitted from now on; blocks until it is in place. Running rows finish on the old one.

        adapter: what to load, or a function that reads it; of several callers for one version the first one's is read, and all wait for it.
        current: False holds the version beside the current one, for requests that name it, until `settle` decides; a dedicated engine cannot.
        Raises what the function raises, and NotReadyError from a closed engine; nothing has changed then.
        """
        with self._wake:
            self._refuse_if_closed()
            pending = self._loading.get((persona, version))
            if pending is None:
                mine = self._loading[persona, version] = Future()
        if pending is not None:
            return pending.result()
        try:
            found = adapter() if callable(adapter) else adapter
            self._between_steps(partial(self._load, persona, found, version, current), alone=self._merge is not None)
        except BaseException as e:
            mine.set_exception(e)
            raise
        else:
            mine.set_result(None)
        finally:
            with self._wake:
                del self._loading[persona, version]

    def settle(self, persona: str, version: str, beside: Collection[str] = ()) -> None:
        """Make a held version the current one and let go of all others, but those named in `beside`, once no row needs them.

        Raises UnknownModelError where the version is not held.
        """
        if version not in self.held(persona):
            raise self._unknown(persona, version)
        self._between_steps(partial(self._slots.settle, persona, version, beside), alone=False)

    def held(self, persona: str) -> tuple[str, ...]:
        """The versions of a persona that requests can have."""
        return tuple(v for p, v in self._merged_version.items() if p == persona) if self._merge else self._slots.held(persona)

    @property
    def _versions(self) -> dict[str, str]:
        return self._merged_version if self._merge else self._slots.versions

    def unload_adapter(self, persona: str) -> None:
        """Take a persona away from requests to come; rows in flight finish. Raises UnknownModelError where none is loaded."""
        if persona not in self._versions:
            raise self._unknown(persona)
        self._between_steps(partial(self._unload, persona), alone=self._merge is not None)

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=not (self._closing or self._broken),
            base=self.base.name,
            versions=dict(self._versions),
            active_rows=len(self._rows),
            queued=len(self._waiting),
            device=str(self.base.device),
            notes=(self._broken,) if self._broken else (),
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        """See Engine.generate."""
        self._check(request)
        loop = asyncio.get_running_loop()
        # Tokenising a long conversation takes a while, and other answers stream on this loop.
        row = await loop.run_in_executor(None, self._row, request, loop)
        with self._wake:
            self._refuse_if_closed()
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(f"all {self.max_rows} rows are busy and {self.max_queue} requests wait; try again in a moment")
            self._waiting.append(row)
            self._wake.notify()
        try:
            while True:
                events = [await row.events.get()]
                # A reader slower than the model gets several tokens at once, not a growing backlog.
                while not row.events.empty():
                    events.append(row.events.get_nowait())
                for event in joined(events):
                    if isinstance(event, BaseException):
                        raise event
                    yield event
                    if event.finish_reason:
                        return
        finally:
            row.cancelled = True

    async def close(self) -> None:
        """See Engine.close."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def uninstall(self) -> None:
        """After close: put the base's own layers and weights back, so that it can be used for something else."""
        self._bank.uninstall()
        give_back(self.base.model)
        if self._merge:
            self._merge.undo()

    def _between_steps(self, do: Callable[[], None], *, alone: bool) -> None:
        work = _Work(do, alone)
        with self._wake:
            self._refuse_if_closed()
            self._work.append(work)
            self._wake.notify()
        work.done.result()

    def _refuse_if_closed(self) -> None:
        if self._closing or self._broken:
            raise NotReadyError(self._broken or CLOSING)

    def _unknown(self, persona: str, version: str | None = None) -> UnknownModelError:
        what = f"version {version} of the persona {persona!r} is not held" if version else f"no adapter of the persona {persona!r} is loaded"
        return UnknownModelError(f"{what}; loaded are {', '.join(self._versions) or 'none'}", param="model")

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what cannot be done before it costs anything."""
        for persona in request.gate:
            if persona not in self._versions:
                raise self._unknown(persona)
        if self.merged and dict(request.gate) != {self.merged: 1.0}:
            raise UnknownModelError(f"this engine answers as {self.merged!r} alone, whose adapter is merged into its base", param="model")
        check_request(request, self.base.model.config.vocab_size)

    def _row(self, request: GenerateRequest, loop: asyncio.AbstractEventLoop) -> Answer:
        lead = max(request.gate, key=lambda p: request.gate[p]) if request.gate else ""
        # A quarter of the context is kept for the answer, unless less was asked for; a short prompt leaves it more.
        least = min(request.max_tokens, self.base.context_tokens // 4)
        prompt, _ = fit_prompt(
            self.base.tokenizer,
            request.messages,
            document=request.document,
            manner=self.manners.get(lead, ""),
            room_tokens=self.base.context_tokens - least,
        )
        room = min(request.max_tokens, self.base.context_tokens - len(prompt))
        random = sampling.generator(request, self.base.device)
        lookup = Lookup(prompt, self._said) if self._guess else None
        return Answer(request, prompt, room, self.base.tokenizer, self.base.stop_ids, loop, random, lookup)

    # -- the model's thread ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._warm_up()
                while self._wait():
                    self._do_work()
                    self._drop_cancelled()
                    self._read_prompts()
                    self._step()
                    self._outbox.send(len(self._rows))
        except Exception as e:  # a fault of the model ends every row with an error, never silently
            self._broken = f"the model stopped: {type(e).__name__}: {e}"
        gone = WorkError(self._broken) if self._broken else NotReadyError(CLOSING)
        with self._wake:
            # Under the lock: whoever comes later is refused, and nobody is left waiting for an event that never comes.
            self._closing = True
            for row in [*self._rows, *self._waiting]:
                self._outbox.put(row, gone)
            self._outbox.flush()
            for work in self._work:
                work.done.set_exception(gone)
            self._rows.clear()
            self._waiting.clear()
            self._work.clear()

    def _warm_up(self) -> None:
        """Let the libraries set themselves up, and this thread get the memory that a chunk takes, before the first request, which would wait for it."""
        for tokens in WARM_UP_TOKENS:
            began = time.monotonic()
            self._decoder.open(0, {})
            self._decoder.prefill(0, [0] * min(tokens, self.base.context_tokens - 1))
            self._decoder.step([[0]])
            if time.monotonic() - began > WARM_UP_S:
                break  # a large base, whose requests will not notice
        self._decoder.close(0)

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closing or self._work or self._waiting or self._rows):
                self._wake.wait()
            return not self._closing

    def _do_work(self) -> None:
        while self._work and not (self._work[0].alone and self._rows):
            work = self._work.popleft()
            try:
                work.do()
                self._prefixes.retain(self._bank.slots)
                work.done.set_result(None)
            except Exception as e:
                work.done.set_exception(e)

    def _make_decoder(self) -> None:
        self._decoder = make_decoder(self.base.model, self._bank, self.max_rows, self.base.context_tokens)
        self._prefixes = Prefixes(self._decoder.cache, self._prefix_bytes)

    def _load(self, persona: str, adapter: Adapter, version: str, current: bool) -> None:
        if self._merge:
            if not current:
                raise WorkError(f"the pool of {persona!r} has its adapter merged into the base and holds one version at a time")
            self._merge.apply(adapter.factors)
            self._make_decoder()
            self._merged_version[persona] = version
            self._merged_phrases = adapter.phrases
        else:
            self._slots.load(persona, adapter, version, current=current)

    def _unload(self, persona: str) -> None:
        self._merged_version.pop(persona, None)
        self._slots.unload(persona)

    def _admit(self) -> None:
        """Give a waiting request a row, unless one is still reading its prompt, or something waits for the rows to end."""
        while self._waiting and len(self._rows) < self.max_rows and not (self._reading or self._work):
            row = self._waiting.popleft()
            if row.cancelled:
                continue
            if gone := [p for p in row.request.gate if p not in self._versions]:
                self._outbox.put(row, self._unknown(gone[0]))
                continue
            if self._merge:
                row.versions = dict(self._merged_version)
            else:
                row.versions, row.gate = self._slots.take(row.request.gate, row.request.versions)
            if row.lookup:
                row.lookup.know([self._merged_phrases] if self._merge else self._slots.phrases(row.gate))
            self._rows.append(row)
            self._decoder.open(len(self._rows) - 1, row.gate)
            return

    @property
    def _reading(self) -> bool:
        return bool(self._rows) and self._rows[-1].fed < len(self._rows[-1].prompt)

    def _read_prompts(self) -> None:
        """Admit requests and read their prompts until as much was read as the rows in flight can wait for."""
        left = self._chunk
        # A small rest is left: a pass over the weights for a few tokens costs as much as for LEAST_TOKENS.
        while left >= min(LEAST_TOKENS, self._chunk):
            self._admit()
            if not self._reading:
                return
            left -= max(LEAST_TOKENS, self._feed(left))
            self._outbox.send(len(self._rows))

    def _feed(self, most: int) -> int:
        """Give the row that reads its prompt the next chunk of it, from memory where it is known, and its first token after the last one.

        Returns how many tokens of `most` that took; one from memory counts as a part of one.
        """
        place, row = len(self._rows) - 1, self._rows[-1]
        recalled = 0
        if row.fed == row.recalled:
            room = most * RECALLED
            known = self._prefixes.recall(place, row.gate, row.prompt, room)
            row.fed = row.recalled = row.fed + known
            recalled = known // RECALLED
            if known and known > room - BLOCK_TOKENS:
                # More of it may be known.
                return recalled
        chunk = row.prompt[row.fed : row.fed + most - recalled]
        try:
            logits = self._decoder.prefill(place, chunk)
        except Exception as e:
            self._outbox.put(row, WorkError(f"the model failed on this prompt: {type(e).__name__}: {e}"))
            row.cancelled = True
            self._drop_cancelled()
            return recalled + len(chunk)
        row.fed += len(chunk)
        if row.fed == len(row.prompt):
            self._take(row, logits[None], logits[None].argmax(-1).tolist(), [])
        self._prefixes.keep(place, row.gate, row.prompt[: row.fed])
        self._drop_cancelled()
        return recalled + len(chunk)

    def _step(self) -> None:
        rows = self._rows[:-1] if self._reading else self._rows
        if not rows:
            return
        tried = guesses([row.lookup for row in rows if row.lookup]) if self._guess else [[] for _ in rows]
        lengths = self._decoder.cache.lengths[: len(rows)]
        logits = self._decoder.step([[row.tokens[-1], *guess] for row, guess in zip(rows, tried, strict=True)])
        likeliest = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            taken = self._take(row, logits[i], likeliest[i], tried[i])
            self._decoder.cache.cut(i, lengths[i] + taken)
        self._drop_cancelled()

    def _take(self, row: Answer, logits: Tensor, likeliest: list[int], guess: list[int]) -> int:
        """Choose a row's next tokens from logits (T, V) of what follows its last token and each of T - 1 guesses; returns how many are chosen.

        A token behind a guess counts only where the guess is what was chosen. A fault of one row ends that row, not the batch.
        """
        taken = 0
        try:
            while True:
                event = row.take(logits[taken], likeliest[taken])
                if event:
                    self._outbox.put(row, event)
                taken += 1
                if row.cancelled or taken > len(guess) or row.tokens[-1] != guess[taken - 1]:
                    break
        except Exception as e:
            self._outbox.put(row, WorkError(f"sampling failed: {type(e).__name__}: {e}"))
            row.cancelled = True
        if row.lookup:
            row.lookup.judge(len(guess), max(0, taken - 1))
        return taken

    def _drop_cancelled(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].cancelled:
                self._drop(place)

    def _drop(self, place: int) -> None:
        """Free a row. The last one takes its place; where that one still reads its prompt it must stay last, and the one before it moves first."""
        row, last = self._rows[place], len(self._rows) - 1
        # The conversation's next turn begins with this one and its answer.
        self._prefixes.keep(place, row.gate, row.prompt[: row.fed] + row.tokens)
        for gap in [last - 1, last] if self._reading and place < last - 1 else [last]:
            if place != gap:
                self._decoder.move(gap, place)
                self._rows[place] = self._rows[gap]
            place = gap
        self._decoder.close(last)
        self._rows.pop()
        self._slots.give_back(row.gate)
        if any(slot not in self._bank.slots for slot in row.gate):
            self._prefixes.retain(self._bank.slots)
