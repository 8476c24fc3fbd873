"""One answer in the making: its prompt, its tokens, and the events that they become. Knows nothing of models or batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from persona_models import sampling
from persona_models.errors import InputError
from persona_models.lookup import Lookup
from persona_models.protocol import FinishReason, GenerateRequest, TokenEvent, TokenLogprob

MAX_STOPS, MAX_STOP_CHARS = 16, 200
MAX_LOGPROBS = 20

Outcome = TokenEvent | BaseException


@dataclass(eq=False)
class Answer:
    """A row of the batch, from the queue to its last token. `events` belong to the event loop `loop`; everything else to the model's thread."""

    request: GenerateRequest
    prompt: list[int]
    max_tokens: int
    tokenizer: Any
    stop_ids: frozenset[int]
    loop: asyncio.AbstractEventLoop
    random: torch.Generator | None
    lookup: Lookup | None  # None: no tokens are guessed
    events: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue)
    gate: dict[str, float] = field(default_factory=dict)  # slot name -> weight
    versions: dict[str, str] = field(default_factory=dict)
    fed: int = 0  # prompt tokens that the model has seen
    recalled: int = 0  # of these, tokens whose keys and values were still known
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    _seen_after: dict[tuple[int, ...], set[int]] = field(default_factory=dict)  # see _followed
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))
    _decoded: int = 0  # characters that left the stream
    _held: str = ""  # decoded, not yet sent: it may be the beginning of a stop string

    def _followed(self) -> set[int]:
        """The tokens that have followed the last ones once, so that another of them would make a run of request.no_repeat come twice."""
        first = len(self.tokens) - self.request.no_repeat + 1
        return self._seen_after.setdefault(tuple(self.tokens[first:]), set()) if self.request.no_repeat and first >= 0 else set()

    def take(self, logits: Tensor, likeliest: int) -> TokenEvent | None:
        """Choose the next token from logits (V,), of which `likeliest` is the largest; returns what is to be sent of it, and is cancelled at its end."""
        request = self.request
        token, banned = likeliest, self._followed()
        if token in banned or not sampling.is_plain(request):
            token = sampling.choose(logits, request, self.random, so_far=len(self.tokens), stop_ids=tuple(self.stop_ids), banned=banned)
        banned.add(token)
        self.tokens.append(token)
        if self.lookup:
            self.lookup.extend([token])
        ended: FinishReason | None = None
        piece = ""
        if token in self.stop_ids:
            ended = "stop"
        else:
            piece = self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
            self._decoded += len(piece)
            if len(self.tokens) >= self.max_tokens:
                ended = "length"
        if ended:
            # The stream holds back bytes that may still become a character; at the end they are said as they are.
            said = self.tokens[:-1] if token in self.stop_ids else self.tokens
            piece += self.tokenizer.decode(said, skip_special_tokens=True)[self._decoded :]
        stops = request.stop if len(self.tokens) > request.min_tokens else ()
        text, self._held, stopped = until_stop(self._held + piece, stops, flush=ended is not None)
        ended = "stop" if stopped else ended
        # The end is no token of the text.
        logprobs = () if request.logprobs is None or token in self.stop_ids else (self._logprob(logits, token, request.logprobs),)
        self.cancelled = self.cancelled or ended is not None
        if not (text or ended or logprobs):
            return None
        return TokenEvent(text, len(self.tokens), len(self.prompt), ended, self.versions, logprobs, self.recalled)

    def _logprob(self, logits: Tensor, token: int, top: int) -> TokenLogprob:
        own, best = sampling.log_probabilities(logits, token, top)
        return TokenLogprob(self.tokenizer.decode([token]), own, tuple((self.tokenizer.decode([i]), p) for i, p in best))


def joined(events: Sequence[Outcome]) -> list[Outcome]:
    """The events of one answer as few as can be: one of all tokens, and an error behind it."""
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    errors: list[Outcome] = [e for e in events if isinstance(e, BaseException)]
    if len(tokens) < 2:
        return [*tokens, *errors]
    return [replace(tokens[-1], text="".join(e.text for e in tokens), logprobs=tuple(p for e in tokens for p in e.logprobs)), *errors]


def check_request(request: GenerateRequest, vocabulary: int) -> None:
    """Raise InputError for what no model could do; vocabulary: tokens of this one."""
    if len(request.stop) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in request.stop):
        raise InputError(f"stop: give at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters", param="stop")
    if request.max_tokens < 1 or not 0 <= request.min_tokens <= request.max_tokens:
        raise InputError("max_tokens must be at least 1, and min_tokens between 0 and max_tokens", param="max_tokens")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise InputError(f"logprobs: at most {MAX_LOGPROBS} likeliest tokens can be reported", param="top_logprobs")
    if strangers := [i for i in request.logit_bias if not 0 <= i < vocabulary]:
        raise InputError(f"logit_bias: {strangers[0]} is no token of this model, which has {vocabulary}", param="logit_bias")


def until_stop(text: str, stops: Sequence[str], *, flush: bool) -> tuple[str, str, bool]:
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
