"""Continuous batching over one base and many adapters: requests in, token events out.

One thread owns the model. Between two steps it takes cancellations and new adapters, admits at most one waiting request (prefill), then runs one
decode step over all rows. Rows are aligned at the right: a row admitted later is padded on the left, and columns that no row needs are dropped.
A row keeps the adapter versions it began with. Knows nothing of HTTP, Ray or MLflow.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import DynamicCache

from persona_models.adapters import Adapter
from persona_models.base_model import BaseModel
from persona_models.errors import NotReadyError, QueueFullError, UnknownModelError, WorkError
from persona_models.gated_lora import LoraBank
from persona_models.prompt import fit_prompt
from persona_models.protocol import EngineStatus, FinishReason, GenerateRequest, TokenEvent

# Below this temperature sampling is greedy: dividing by less would overflow.
COLDEST = 1e-3


@dataclass
class _Row:
    """One answer in the making."""

    request: GenerateRequest
    prompt: list[int]
    max_tokens: int
    emit: Callable[[TokenEvent | BaseException], None]
    gate: dict[str, float] = field(default_factory=dict)  # slot name -> weight
    versions: dict[str, str] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))
    decoded: int = 0  # characters that left the stream
    held: str = ""  # decoded, not yet sent: it may be the beginning of a stop string
    random: torch.Generator | None = None
    cancelled: bool = False


class PersonaEngine:
    """An Engine over a loaded base. `manners` are the personas' system prompts, used by bases that read system messages."""

    def __init__(self, base: BaseModel, *, manners: Mapping[str, str] | None = None, max_rows: int = 16, max_queue: int = 64) -> None:
        self.base = base
        self.manners = dict(manners or {})
        self.max_rows, self.max_queue = max_rows, max_queue
        self._bank = LoraBank(base.model)
        self._slot_of: dict[str, str] = {}  # persona -> slot of its current version
        self._versions: dict[str, str] = {}
        self._uses: dict[str, int] = {}  # slot -> rows that still need it
        self._loads = 0
        self._waiting: deque[_Row] = deque()
        self._work: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._rows: list[_Row] = []
        self._batch = _Batch(base)
        self._wake = threading.Condition()
        self._closing = False
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="persona-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------------------------------------------------

    def load_adapter(self, persona: str, adapter: Adapter, version: str) -> None:
        """Make `version` the persona's adapter for rows admitted from now on; blocks until it is in place. Running rows finish on the old one."""
        done: Future[None] = Future()

        def load() -> None:
            self._loads += 1
            slot = f"{persona}#{self._loads}"
            self._bank.load(slot, adapter.rank, adapter.factors)
            old = self._slot_of.get(persona)
            self._slot_of[persona], self._versions[persona], self._uses[slot] = slot, version, 0
            if old:
                self._release(old)
            self._reopen()

        with self._wake:
            self._refuse_if_closed()
            self._work.append((load, done))
            self._wake.notify()
        done.result()

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
        for persona in request.gate:
            if persona not in self._slot_of:
                raise UnknownModelError(
                    f"no adapter of the persona {persona!r} is loaded; loaded are {', '.join(self._slot_of) or 'none'}", param="model"
                )
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()

        def emit(event: TokenEvent | BaseException) -> None:
            # The caller's loop may be gone with the caller; then nobody waits for the event.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        # Tokenising a long conversation takes a while, and other answers stream on this loop.
        row = await loop.run_in_executor(None, self._row, request, emit)
        with self._wake:
            self._refuse_if_closed()
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(f"all {self.max_rows} rows are busy and {self.max_queue} requests wait; try again in a moment")
            self._waiting.append(row)
            self._wake.notify()
        try:
            while True:
                event = await events.get()
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
        """After close: put the base's own layers back, so that it can be used for something else."""
        self._bank.uninstall()

    def _refuse_if_closed(self) -> None:
        if self._closing or self._broken:
            raise NotReadyError(self._broken or "the engine is shutting down; try again shortly")

    def _row(self, request: GenerateRequest, emit: Callable[[TokenEvent | BaseException], None]) -> _Row:
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
        row = _Row(request, prompt, min(request.max_tokens, self.base.context_tokens - len(prompt)), emit)
        if request.temperature >= COLDEST:
            row.random = torch.Generator(device=self.base.device)
            row.random.manual_seed(request.seed) if request.seed is not None else row.random.seed()
        return row

    # -- the model's thread ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    while self._work:
                        self._do(*self._work.popleft())
                    self._drop([r for r in self._rows if r.cancelled])
                    if self._waiting and len(self._rows) < self.max_rows:
                        self._admit(self._waiting.popleft())
                    if self._rows:
                        self._step()
        except Exception as e:  # a fault of the model ends every row with an error, never silently
            self._broken = f"the model stopped: {type(e).__name__}: {e}"
        gone = WorkError(self._broken) if self._broken else NotReadyError("the engine is shutting down; try again shortly")
        with self._wake:
            # Under the lock: whoever comes later is refused, and nobody is left waiting for an event that never comes.
            self._closing = True
            for row in [*self._rows, *self._waiting]:
                row.emit(gone)
            for _, done in self._work:
                done.set_exception(gone)
            self._rows.clear()
            self._waiting.clear()
            self._work.clear()

    @staticmethod
    def _do(work: Callable[[], None], done: Future[None]) -> None:
        try:
            work()
            done.set_result(None)
        except Exception as e:
            done.set_exception(e)

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closing or self._work or self._waiting or self._rows):
                self._wake.wait()
            return not self._closing

    def _admit(self, row: _Row) -> None:
        if row.cancelled:
            return
        row.gate = {self._slot_of[p]: w for p, w in row.request.gate.items()}
        row.versions = {p: self._versions[p] for p in row.request.gate}
        for slot in row.gate:
            self._uses[slot] += 1
        self._bank.gate.rows = self._bank.open([row.gate])
        try:
            logits = self._batch.prefill(row.prompt)
        except Exception as e:
            for slot in row.gate:
                self._uses[slot] -= 1
            row.emit(WorkError(f"the model failed on this prompt: {type(e).__name__}: {e}"))
            self._reopen()
            return
        self._rows.append(row)
        self._reopen()
        self._take_safely(row, logits[0])
        self._drop([r for r in [row] if r.cancelled])

    def _step(self) -> None:
        logits = self._batch.step([r.tokens[-1] for r in self._rows])
        for i, row in enumerate(self._rows):
            self._take_safely(row, logits[i])
        self._drop([r for r in self._rows if r.cancelled])

    def _take_safely(self, row: _Row, logits: Tensor) -> None:
        """A fault of one row ends that row, not the batch."""
        try:
            self._take(row, logits)
        except Exception as e:
            row.emit(WorkError(f"sampling failed: {type(e).__name__}: {e}"))
            row.cancelled = True

    def _take(self, row: _Row, logits: Tensor) -> None:
        """Sample a row's next token from logits (V,), send what it adds to the text, and mark the row as done where it ends."""
        token = _sample(logits, row)
        row.tokens.append(token)
        ended: FinishReason | None = None
        piece = ""
        if token in self.base.stop_ids:
            ended = "stop"
        else:
            piece = row.stream.step(self.base.tokenizer.backend_tokenizer, token) or ""
            row.decoded += len(piece)
            if len(row.tokens) >= row.max_tokens:
                ended = "length"
        if ended:
            # The stream holds back bytes that may still become a character; at the end they are said as they are.
            said = row.tokens[:-1] if token in self.base.stop_ids else row.tokens
            piece += self.base.tokenizer.decode(said, skip_special_tokens=True)[row.decoded :]
        text, row.held, stopped = _until_stop(row.held + piece, row.request.stop, flush=ended is not None)
        ended = "stop" if stopped else ended
        if text or ended:
            row.emit(TokenEvent(text, len(row.tokens), len(row.prompt), ended, row.versions))
        row.cancelled = row.cancelled or ended is not None

    def _drop(self, rows: list[_Row]) -> None:
        if not rows:
            return
        keep = [i for i, r in enumerate(self._rows) if r not in rows]
        for row in rows:
            for slot in row.gate:
                self._uses[slot] -= 1
                if slot not in self._slot_of.values():
                    self._release(slot)
        self._rows = [self._rows[i] for i in keep]
        self._batch.keep(keep)
        self._reopen()

    def _release(self, slot: str) -> None:
        """Free the slot of a version that is no longer current once no row needs it."""
        if self._uses.get(slot) == 0:
            self._bank.unload(slot)
            del self._uses[slot]

    def _reopen(self) -> None:
        self._bank.gate.rows = self._bank.open([r.gate for r in self._rows])


class _Batch:
    """The key-value cache of the rows in flight, all of one length T, shorter rows padded on the left."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=base.device)  # (B, T)

    def prefill(self, prompt: list[int]) -> Tensor:
        """Add a row; returns its next-token logits (1, V). The gate must be open for this row alone."""
        ids = torch.tensor([prompt], device=self.base.device)
        cache = DynamicCache()
        out = self.base.model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._join(cache, len(prompt))
        return out.logits[:, -1]

    def step(self, last: list[int]) -> Tensor:
        """Feed each row its last token; returns next-token logits (B, V)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(last), 1)], dim=1)
        positions = self.mask.sum(1, keepdim=True) - 1
        ids = torch.tensor(last, device=self.base.device).unsqueeze(1)
        out = self.base.model(input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only, and drop the columns that were padding for all of them."""
        if self.cache is None:
            return
        if not rows:
            self.cache, self.mask = None, self.mask[:0, :0]
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        first = int(self.mask.argmax(1).min())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]

    def _join(self, new: DynamicCache, length: int) -> None:
        mask = self.mask.new_ones(1, length)
        if self.cache is None:
            self.cache, self.mask = new, mask
            return
        total = max(self.mask.shape[1], length)
        for old, add in zip(self.cache.layers, new.layers, strict=True):
            old.keys = torch.cat([_pad_left(old.keys, total), _pad_left(add.keys, total)])
            old.values = torch.cat([_pad_left(old.values, total), _pad_left(add.values, total)])
        self.mask = torch.cat([_pad_columns(self.mask, total), _pad_columns(mask, total)])


def _pad_left(states: Tensor, total: int) -> Tensor:
    """(B, H, T, D) -> (B, H, total, D), zeros on the left."""
    return torch.nn.functional.pad(states, (0, 0, total - states.shape[-2], 0))


def _pad_columns(mask: Tensor, total: int) -> Tensor:
    """(B, T) -> (B, total), zeros on the left."""
    return torch.nn.functional.pad(mask, (total - mask.shape[-1], 0))


def _sample(logits: Tensor, row: _Row) -> int:
    """One token from logits (V,): the largest at temperature 0, else from the nucleus of probability top_p."""
    if row.random is None:
        return int(logits.argmax())
    probs = torch.softmax(logits.float() / row.request.temperature, dim=-1)
    if row.request.top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        # A token stays while the probability before it is under top_p, so that at least one stays.
        ranked = ranked * ((ranked.cumsum(-1) - ranked) < row.request.top_p)
        return int(order[torch.multinomial(ranked, 1, generator=row.random)])
    return int(torch.multinomial(probs, 1, generator=row.random))


def _until_stop(text: str, stops: tuple[str, ...], *, flush: bool) -> tuple[str, str, bool]:
    """Split text at the first stop string.

    Returns (what may be sent, what must wait because it may begin a stop string, whether a stop string was met).
    """
    found = [i for s in stops if (i := text.find(s)) >= 0]
    if found:
        return text[: min(found)], "", True
    if flush:
        return text, "", False
    wait = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - wait], text[len(text) - wait :], False
