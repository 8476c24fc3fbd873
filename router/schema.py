"""What goes over the wire: OpenAI-compatible bodies, the `deskroute` block, errors. `model` is parsed here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from persona_models.errors import DeskrouteError, InputError, UnknownModelError
from persona_models.protocol import BASE, Message, TokenEvent, TokenLogprob

AUTO = "auto"


class Body(BaseModel):
    """Base of request bodies: unknown fields are ignored, since clients send many, and null means not set."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _as_sent(cls, value: Any) -> Any:
        return {_whole(k): _whole(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _whole(value: Any) -> Any:
    """JSON whose texts are whole characters: half an emoji, which a program cut in two, becomes U+FFFD, since nothing could write it down."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return {_whole(k): _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def _text_of(content: Any) -> Any:
    """OpenAI's list-of-parts form -> plain text; None (a tool call's content) -> empty."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            what = f"one of type {kind!r}" if kind and kind != "text" else repr(part)[:80]
            raise ValueError(f'only text is read: a string, or parts of the form {{"type": "text", "text": "..."}}, not {what}')
        texts.append(part["text"])
    return "\n".join(texts)


def _spelled_out(value: Any) -> Any:
    """A number among texts as its digits."""
    return str(value) if isinstance(value, int | float) else value


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]

    def plain(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


class Conversation(Body):
    """What is scored: messages and the requester's profile (`metadata`)."""

    model: str = AUTO
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    metadata: dict[str, Annotated[str, BeforeValidator(_spelled_out)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not any(m.role == "user" and m.content.strip() for m in self.messages):
            raise ValueError("messages need at least one user turn with text")
        return self

    def turns(self) -> tuple[Message, ...]:
        return tuple(m.plain() for m in self.messages)


class StreamOptions(Body):
    include_usage: bool = False


class ChatRequest(Conversation):
    """POST /v1/chat/completions."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else (v or ()))
    ] = Field((), max_length=16)
    user: str | None = Field(None, max_length=512)
    n: int | None = 1
    tools: tuple[Any, ...] | None = None
    functions: tuple[Any, ...] | None = None
    response_format: dict[str, Any] | None = None
    modalities: tuple[str, ...] = ("text",)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=300)
    # Not OpenAI's, but what vLLM and others call the same.
    top_k: int | None = Field(None, ge=-1)
    min_tokens: int | None = Field(None, ge=0, le=1_000_000)

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.n not in (None, 1):
            raise ValueError("n: only one answer per request is supported")
        if name := "tools" if self.tools else "functions" if self.functions else None:
            raise ValueError(f"{name}: they are not supported by the helpdesk's models; leave them out")
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format: answers are text; leave it out, or put them into a format of your own")
        if self.modalities != ("text",):
            raise ValueError("modalities: answers are text alone")
        if name := "frequency_penalty" if self.frequency_penalty else "presence_penalty" if self.presence_penalty else None:
            raise ValueError(f"{name}: it is not supported; leave it out, generation.no_repeat keeps answers from repeating themselves")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self


class RouteInput(Body):
    """One input of a batch of POST /v1/route, also a line of `deskroute route --jsonl`."""

    id: str | int | None = None
    text: str | None = None
    messages: tuple[ChatMessage, ...] = ()
    profile: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if bool(self.text and self.text.strip()) == bool(self.messages):
            raise ValueError("give either text or messages")
        return self

    def turns(self) -> tuple[Message, ...]:
        return tuple(m.plain() for m in self.messages) or (Message("user", self.text or ""),)


class RouteRequest(Body):
    """POST /v1/route with several inputs."""

    inputs: tuple[RouteInput, ...] = Field(min_length=1, max_length=1000)


COMPLETION = "chatcmpl-"


def _request_id(value: Any) -> Any:
    return value.removeprefix(COMPLETION) if isinstance(value, str) else value


class FeedbackRequest(Body):
    """POST /v1/feedback."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: Annotated[str, BeforeValidator(_request_id)] = Field(
        min_length=1, max_length=100, description="the answer's deskroute.request_id, or its id"
    )
    rating: Literal["up", "down"]
    comment: str | None = Field(None, max_length=10_000)
    correct_persona: str | None = Field(None, max_length=100, description="who should have been answered")
    better_answer: str | None = Field(None, max_length=50_000, description="what a good answer would have been")
    user: str | None = Field(None, max_length=512)


class ReasonBlock(BaseModel):
    feature: str
    persona: str
    weight: float


class SegmentBlock(BaseModel):
    text: str
    persona: str | None
    confidence: float


class SourceBlock(BaseModel):
    id: str
    title: str
    score: float


class DeskrouteBlock(BaseModel):
    """What every answer says about itself."""

    request_id: str
    decision: Literal["persona", "mix", "fallback", "decline"]
    persona: str | None
    confidence: float
    scores: dict[str, float]
    in_domain: float
    mix: dict[str, float]
    segments: list[SegmentBlock]
    reasons: list[ReasonBlock]
    sources: list[SourceBlock]
    versions: dict[str, str]
    router_version: str


def parse_model(model: str, personas: Sequence[str]) -> str | None:
    """`model` -> None for "auto", "base", or a persona id. Raises UnknownModelError (404)."""
    if model == AUTO:
        return None
    if model == BASE or model in personas:
        return model
    raise UnknownModelError(f"the model {model!r} does not exist; use auto, base or one of {', '.join(personas)}", param="model")


def completion_id(request_id: str) -> str:
    return f"{COMPLETION}{request_id}"


def usage(last: TokenEvent) -> dict[str, Any]:
    """What an answer with this last event took, in OpenAI's shape."""
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


def logprobs_block(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Log-probabilities in OpenAI's shape; None where none were asked for."""
    if not tokens:
        return None

    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {"content": [one(t.token, t.logprob) | {"top_logprobs": [one(*other) for other in t.top]} for t in tokens], "refusal": None}


def completion(block: DeskrouteBlock, model: str, text: str, last: TokenEvent, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The body of an answer that is not streamed; `last` is its last event."""
    return {
        "id": completion_id(block.request_id),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": logprobs_block(logprobs),
                "finish_reason": last.finish_reason or "stop",
            }
        ],
        "usage": usage(last),
        "deskroute": block.model_dump(),
    }


def error_body(error: DeskrouteError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


# pydantic's words where they are a programmer's.
_PLAIN = {
    "missing": "it is missing",
    "too_short": "it needs at least {min_length} of them",
    "too_long": "at most {max_length} are allowed",
    "tuple_type": "it must be a list",
    "model_type": "it must be an object, such as {{...}}",
    "model_attributes_type": "it must be an object, such as {{...}}",
    "dict_type": "it must be an object, such as {{...}}",
    "string_type": "it must be a string",
    "extra_forbidden": "there is no such field; there are " + ", ".join(FeedbackRequest.model_fields),
}


def first_fault(errors: Sequence[Any]) -> InputError:
    """pydantic's list of faults -> one InputError about the first."""
    fault = errors[0]
    path = [str(p) for p in fault["loc"] if p not in ("body", "[key]")]
    if fault["type"] == "json_invalid":
        return InputError(f"the body is not valid JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] in _PLAIN:
        message = _PLAIN[fault["type"]].format(**fault.get("ctx", {}))
    if not path:
        name, colon, _ = message.partition(": ")
        return InputError(message, param=name if colon and name.isidentifier() else None)
    return InputError(f"{'.'.join(path)}: {message}", param=".".join(path))
