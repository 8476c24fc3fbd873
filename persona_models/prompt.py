"""Messages -> tokens and loss mask: the only place where a prompt is laid out, for training, evaluation and serving alike.

A tokenizer whose chat template knows `documents` (the built-in one does) gets the article there; for any other template the manner, the article and
the caller's own system messages go into one system message. A tokenizer without a template gets PLAIN_TEMPLATE. This file knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persona_models.errors import ContextLengthError
from persona_models.protocol import Message

KNOWLEDGE, USER, ASSISTANT, END, PAD = "<|knowledge|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, END, KNOWLEDGE, USER, ASSISTANT)

# The built-in base reads no system messages: it is too small to follow them, and its manner comes from the adapter.
BUILTIN_TEMPLATE = (
    "<|knowledge|>{% if documents %}{{ documents[0]['text'] }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Service desk: {{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Service desk:{% endif %}"
)
WITH_ARTICLE = "Answer from this knowledge article and add nothing that it does not say:\n{document}"
WITHOUT_ARTICLE = "No knowledge article covers this request: invent no steps, hand over to the service desk."


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer without a chat template the plain one, and a pad token."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(tokenizer: Any, messages: Sequence[Message], *, document: str | None, manner: str = "", answer: str | None = None) -> str:
    """The prompt as text, ready for an answer, or with the answer as its last turn."""
    turns, kwargs = _laid_out(tokenizer, messages, document, manner)
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return _apply(tokenizer, turns, add_generation_prompt=answer is None, tokenize=False, **kwargs)


def encode_prompt(tokenizer: Any, messages: Sequence[Message], *, document: str | None, manner: str = "") -> list[int]:
    """Token ids of a prompt, ready for the answer. Control tokens inside messages are encoded as plain text, so they steer nothing."""
    turns, kwargs = _laid_out(tokenizer, messages, document, manner)
    return _apply(tokenizer, turns, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True, **kwargs)


def encode_example(
    tokenizer: Any, messages: Sequence[Message], answer: str, *, document: str | None, manner: str = ""
) -> tuple[list[int], list[int]]:
    """A training example.

    Returns (ids, labels), both of length T; labels are ids where the answer and its end are, -100 over the prompt.
    """
    prompt = encode_prompt(tokenizer, messages, document=document, manner=manner)
    before = render(tokenizer, messages, document=document, manner=manner)
    after = render(tokenizer, messages, document=document, manner=manner, answer=answer)
    # What the template itself writes behind the answer is the end of the turn; a template that rewrites the past gets the end token alone.
    completion = after[len(before) :] if after.startswith(before) else answer + (tokenizer.eos_token or "")
    target = tokenizer(completion.rstrip("\n"), add_special_tokens=False)["input_ids"]
    return prompt + target, [-100] * len(prompt) + target


def fit_prompt(
    tokenizer: Any, messages: Sequence[Message], *, document: str | None, manner: str = "", room_tokens: int
) -> tuple[list[int], tuple[Message, ...]]:
    """encode_prompt within room_tokens: the oldest turns of a long conversation are left out, never the last one or a system message.

    Returns (ids, messages kept). Raises ContextLengthError when the last turn alone does not fit.
    """
    # A conversation may begin at any user turn; leaving out more never makes it longer, so bisect.
    system = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    starts = [0, *(i for i, m in enumerate(turns) if i and m.role == "user")]

    def attempt(start: int) -> tuple[list[int], tuple[Message, ...]]:
        kept = (*system, *turns[start:])
        return encode_prompt(tokenizer, kept, document=document, manner=manner), kept

    best = attempt(starts[0])
    if len(best[0]) <= room_tokens:
        return best
    low, high = 0, len(starts) - 1
    best = attempt(starts[high])
    if len(best[0]) > room_tokens:
        raise ContextLengthError(
            f"the prompt is {len(best[0])} tokens long and only {room_tokens} fit beside the answer; shorten the message, or ask for fewer max_tokens",
            param="messages",
        )
    while high - low > 1:
        middle = (low + high) // 2
        found = attempt(starts[middle])
        if len(found[0]) <= room_tokens:
            high, best = middle, found
        else:
            low = middle
    return best


def _laid_out(tokenizer: Any, messages: Sequence[Message], document: str | None, manner: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    if "documents" in tokenizer.chat_template:
        if manner and tokenizer.chat_template != BUILTIN_TEMPLATE:
            turns.insert(0, {"role": "system", "content": manner})
        return turns, {"documents": [{"title": "", "text": document}] if document else None}
    knowledge = WITH_ARTICLE.format(document=document) if document else WITHOUT_ARTICLE
    asked = [t["content"] for t in turns if t["role"] == "system"]
    turns = [t for t in turns if t["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(s for s in [manner, *asked, knowledge] if s)}, *turns], {}


def _apply(tokenizer: Any, turns: list[dict[str, str]], **kwargs: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **kwargs)
    except Exception:
        # Some templates (Gemma's, older Mistral's) refuse a system turn: say it at the head of the first user turn.
        if not turns or turns[0]["role"] != "system":
            raise
        system, rest = turns[0]["content"], [dict(t) for t in turns[1:]]
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
        return tokenizer.apply_chat_template(rest, **kwargs)
