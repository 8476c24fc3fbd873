"""A deterministic engine that ships: tests, demonstrations and gateway benchmarks run on it without weights, torch or a GPU.

It answers with the personas of the gate, the first line of the article and the last message, one word an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from persona_models.errors import ContextLengthError, NotReadyError, UnknownModelError
from persona_models.protocol import EngineStatus, FinishReason, GenerateRequest, TokenEvent, TokenLogprob


class FakeEngine:
    """An Engine whose answer is a function of the request.

    token_s: pause before each event; fail_after: raise NotReadyError after that many events, as a dying replica would; context_tokens counts words.
    """

    def __init__(self, versions: Mapping[str, str], *, token_s: float = 0.0, fail_after: int | None = None, context_tokens: int = 4096) -> None:
        self.versions = dict(versions)
        self.token_s, self.fail_after, self.context_tokens = token_s, fail_after, context_tokens
        self.active = 0
        self.cancelled = 0
        self.closed = False

    @staticmethod
    def answer(request: GenerateRequest) -> str:
        """The whole text that a request will get."""
        gate = "+".join(f"{p}:{w:.2f}" if len(request.gate) > 1 else p for p, w in sorted(request.gate.items())) or "base"
        article = request.document.splitlines()[0] if request.document else "no article"
        return f"[{gate}] {article} | {request.messages[-1].content}"

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        """See Engine.generate."""
        if self.closed:
            raise NotReadyError("the engine is shutting down; try again shortly")
        for persona in request.gate:
            if persona not in self.versions:
                raise UnknownModelError(f"no adapter of the persona {persona!r} is loaded", param="model")
        prompt = sum(len(m.content.split()) for m in request.messages)
        if prompt > self.context_tokens:
            raise ContextLengthError(f"the prompt is {prompt} words long and only {self.context_tokens} fit", param="messages")
        words = self.answer(request).split(" ")
        pieces = [w if i == 0 else " " + w for i, w in enumerate(words)]
        cut = pieces[: request.max_tokens]
        versions = {p: self.versions[p] for p in request.gate}
        self.active += 1
        sent = 0
        try:
            for n, piece in enumerate(cut, 1):
                await asyncio.sleep(self.token_s)
                if self.fail_after is not None and n > self.fail_after:
                    raise NotReadyError("the fake engine was told to fail here")
                last = n == len(cut)
                reason: FinishReason | None = ("stop" if len(cut) == len(pieces) else "length") if last else None
                sent = n
                # It is always certain, and there is nothing beside what it says.
                logprobs = () if request.logprobs is None else (TokenLogprob(piece, 0.0, ((piece, 0.0),)[: request.logprobs]),)
                yield TokenEvent(piece, n, prompt, reason, versions, logprobs)
        finally:
            self.active -= 1
            self.cancelled += sent < len(cut)

    def status(self) -> EngineStatus:
        return EngineStatus(not self.closed, "fake", dict(self.versions), self.active, 0, "cpu")

    async def close(self) -> None:
        self.closed = True
