"""What the front door knows of the models: a request, the events that answer it, and the Engine that turns one into the other.

Plain records only, so that they cross a process boundary cheaply. This file imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

BASE = "base"
BUILTIN = "builtin"

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class GenerateRequest:
    """One answer to generate.

    gate: persona id -> weight of its adapter; empty means the base alone, one entry of 1.0 one persona, several a mixture.
    versions: persona id -> the version of its adapter that is wanted; where none is named, or it is no longer held, the current one answers.
    lineup_ms: when the caller read which versions are in force, milliseconds since 1970; an engine that is older than this catches up first.
    document: the knowledge article as text, or None; where it is None the model hands over instead of inventing steps.
    top_k: 0 for all tokens; min_tokens: the answer does not end before; logit_bias: token id -> what is added to its logit;
    no_repeat: a run of so many tokens that the answer already holds does not come again, 0 for no such rule;
    logprobs: None, or how many of the likeliest tokens are reported beside each token's own log-probability.
    """

    request_id: str
    messages: tuple[Message, ...]
    gate: Mapping[str, float] = field(default_factory=dict)
    document: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    no_repeat: int = 0
    logprobs: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    lineup_ms: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer with its natural log-probability, and the likeliest tokens at its place with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A piece of an answer: the tokens since the last event, one or several.

    text may be empty: a token can end inside a character, or inside what may become a stop string. The last event carries finish_reason;
    versions (persona id -> "builtin" or registry version) is on every event and does not change within one answer. logprobs are those of the
    tokens since the last event, where the request asked for them. cached_tokens: how many of the prompt's tokens did not have to be read again.
    """

    text: str
    completion_tokens: int
    prompt_tokens: int
    finish_reason: FinishReason | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineStatus:
    """How an engine is doing: what it holds and how busy it is."""

    ready: bool
    base: str
    versions: Mapping[str, str]
    active_rows: int
    queued: int
    device: str
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """Turns requests into token events; many may run at once."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        """Yield the answer's events.

        Closing the iterator cancels the row. Raises InputError (what is asked cannot be done), ContextLengthError, QueueFullError,
        UnknownModelError (a gate names no loaded persona).
        """
        ...

    def status(self) -> EngineStatus: ...

    async def close(self) -> None:
        """Stop the model thread; running answers end with NotReadyError."""
        ...
