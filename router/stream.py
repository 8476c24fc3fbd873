"""Token events -> server-sent events, as OpenAI's clients read them.

The first chunk carries the `deskroute` block. An error after the first byte becomes an `error` event; the stream always ends with [DONE], so that a
client can tell a finished answer from a broken connection.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from persona_models.errors import DeskrouteError
from persona_models.protocol import TokenEvent, TokenLogprob
from router.schema import DeskrouteBlock, completion_id, error_body, logprobs_block, usage

DONE = b"data: [DONE]\n\n"


async def server_sent_events(events: AsyncGenerator[TokenEvent], block: DeskrouteBlock, model: str, *, include_usage: bool) -> AsyncGenerator[bytes]:
    """Yield the stream of one answer; closing it closes `events`."""
    head = {"id": completion_id(block.request_id), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    last = TokenEvent("", 0, 0)
    try:
        first = True
        async for last in events:
            if first:
                delta = {"role": "assistant", "content": last.text}
                yield _event(
                    {**head, "choices": [_choice(delta, None, last.logprobs)], "deskroute": block.model_dump() | {"versions": dict(last.versions)}}
                )
                first = False
            elif last.text or last.logprobs:
                yield _event({**head, "choices": [_choice({"content": last.text}, None, last.logprobs)]})
        yield _event({**head, "choices": [_choice({}, last.finish_reason)]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": usage(last)})
    except DeskrouteError as e:
        yield _event(error_body(e))
    finally:
        await events.aclose()
    yield DONE


def _choice(delta: dict[str, Any], finish_reason: str | None, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs_block(logprobs), "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def in_turn(answers: Sequence[AsyncGenerator[TokenEvent]]) -> AsyncGenerator[TokenEvent]:
    """Several answers as one: made at the same time, read in order, with an empty line between them.

    Tokens are counted over all; the answer's versions are those of every part; one that was cut by its length makes the whole cut.
    """
    queues: list[asyncio.Queue[TokenEvent | Exception | None]] = [asyncio.Queue() for _ in answers]

    async def pump(answer: AsyncGenerator[TokenEvent], queue: asyncio.Queue[TokenEvent | Exception | None]) -> None:
        try:
            async for event in answer:
                queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as e:
            # Raised where the answer is read.
            queue.put_nowait(e)
        finally:
            await answer.aclose()

    tasks = [asyncio.create_task(pump(a, q)) for a, q in zip(answers, queues, strict=True)]
    try:
        heads = [await queue.get() for queue in queues]
        for head in heads:
            if isinstance(head, Exception):
                raise head
        firsts = [head for head in heads if isinstance(head, TokenEvent)]
        versions = {p: v for first in firsts for p, v in first.versions.items()}
        prompt_tokens, cached = sum(first.prompt_tokens for first in firsts), sum(first.cached_tokens for first in firsts)
        tokens, reason = 0, None
        for n, (event, queue) in enumerate(zip(heads, queues, strict=True)):
            last_part, spent = n == len(queues) - 1, 0
            while event is not None:
                if isinstance(event, Exception):
                    raise event
                spent = event.completion_tokens
                ended = event.finish_reason is not None
                if ended and reason != "length":
                    reason = event.finish_reason
                yield replace(
                    event,
                    text=event.text + ("\n\n" if ended and not last_part else ""),
                    completion_tokens=tokens + spent,
                    prompt_tokens=prompt_tokens,
                    finish_reason=reason if ended and last_part else None,
                    versions=versions,
                    cached_tokens=cached,
                )
                event = await queue.get()
            tokens += spent
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
