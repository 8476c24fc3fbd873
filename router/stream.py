"""Token events -> server-sent events, as OpenAI's clients read them.

The first chunk carries the `deskroute` block. An error after the first byte becomes an `error` event; the stream always ends with [DONE], so that a
client can tell a finished answer from a broken connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
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
            yield _event({**head, "choices": [], "usage": usage(last.prompt_tokens, last.completion_tokens)})
    except DeskrouteError as e:
        yield _event(error_body(e))
    finally:
        await events.aclose()
    yield DONE


def _choice(delta: dict[str, Any], finish_reason: str | None, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs_block(logprobs), "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
