"""How good a model is: held-out loss, the persona matrix, and answers generated through the engine that serves.

Knows nothing of MLflow; it returns numbers and tables.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from persona_models.adapters import Adapter
from persona_models.base_model import BaseModel
from persona_models.engine import PersonaEngine
from persona_models.errors import ContextLengthError
from persona_models.gated_lora import LoraBank
from persona_models.protocol import GenerateRequest
from pipelines.dataset import Sample
from pipelines.finetune import encode_samples
from pipelines.training import mean_loss

# What an answer takes from its article: numbers, menu paths, quoted or capitalised names.
_FACT = re.compile(r"\d[\d.,:]*\d|\d+|[\w&.+-]+(?: [\w&.+-]+)* > [\w&.+ -]+|`[^`]+`|\"[^\"]+\"|(?<=[a-z,] )[A-Z][\w.+-]+(?: [A-Z][\w.+-]+)*")


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    finish_reason: str
    tokens: int
    seconds: float = 0.0


@dataclass(frozen=True)
class AnswerScores:
    """Over a list of answers: shares in 0..1, tokens per answer.

    carried: of the facts (numbers, menu paths, names) that both the document and the reference answer have, the share that the answer has too;
    grounded: of the facts the answer states, the share that the document, the prompt or the reference has.
    """

    ends: float
    carried: float
    grounded: float
    tokens: float


def persona_row(base: BaseModel, samples: Sequence[Sample], adapters: Mapping[str, Adapter | None], manner: str, max_tokens: int) -> dict[str, float]:
    """One row of the persona matrix: the samples' loss under each adapter (None: the base alone)."""
    encoded = encode_samples(base, samples, manner, max_tokens)
    row = {}
    for name, adapter in adapters.items():
        with Applied(base, adapter):
            row[name] = mean_loss(base.model, encoded, base.tokenizer.pad_token_id)
    return row


def persona_matrix(
    base: BaseModel,
    samples: Mapping[str, Sequence[Sample]],
    adapters: Mapping[str, Adapter],
    manners: Mapping[str, str],
    max_tokens: int,
) -> np.ndarray:
    """Losses (rows: personas' samples; columns: the base, then the adapters in order), nats per answer token."""
    columns: dict[str, Adapter | None] = {"base": None, **adapters}
    rows = [persona_row(base, samples[p], columns, manners.get(p, ""), max_tokens) for p in tqdm(samples, desc="persona matrix", unit="row")]
    return np.array([[row[c] for c in columns] for row in rows])


class Applied:
    """An adapter on every row, for as long as the block lasts; the base's own layers are put back after it."""

    def __init__(self, base: BaseModel, adapter: Adapter | None) -> None:
        self.base, self.adapter = base, adapter

    def __enter__(self) -> None:
        if self.adapter:
            self.bank = LoraBank(self.base.model)
            self.bank.load("one", self.adapter.rank, self.adapter.factors)
            self.bank.gate.rows = self.bank.open([{"one": 1.0}])

    def __exit__(self, *_: object) -> None:
        if self.adapter:
            self.bank.uninstall()


def generate_answers(
    base: BaseModel,
    samples: Sequence[Sample],
    adapter: Adapter | None,
    *,
    persona: str,
    manner: str,
    max_tokens: int,
    no_repeat: int,
    title: str,
) -> list[Answer]:
    """Greedy answers, through the engine that serves and by the rule that serving has."""
    return asyncio.run(_generate(base, samples, adapter, persona, manner, max_tokens, no_repeat, title))


async def _generate(
    base: BaseModel, samples: Sequence[Sample], adapter: Adapter | None, persona: str, manner: str, max_tokens: int, no_repeat: int, title: str
) -> list[Answer]:
    # Losses are computed in this thread, with all of torch's: see PersonaEngine.
    engine = PersonaEngine(base, manners={persona: manner}, max_rows=16, max_queue=len(samples) + 1, threads=1)
    gate = {}
    if adapter:
        engine.load_adapter(persona, adapter, "eval")
        gate = {persona: 1.0}
    bar = tqdm(total=len(samples), desc=title, unit="answer")

    async def one(i: int, sample: Sample) -> Answer:
        request = GenerateRequest(str(i), sample.messages, gate, sample.document, max_tokens, no_repeat=no_repeat)
        began = time.perf_counter()
        try:
            events = [event async for event in engine.generate(request)]
        except ContextLengthError:
            # A ticket that no prompt can hold gets no answer, and counts as one that did not end.
            return Answer("", "too long", 0)
        finally:
            bar.update()
        return Answer("".join(e.text for e in events), str(events[-1].finish_reason), events[-1].completion_tokens, time.perf_counter() - began)

    try:
        return await asyncio.gather(*(one(i, s) for i, s in enumerate(samples)))
    finally:
        bar.close()
        await engine.close()
        engine.uninstall()


def facts(text: str) -> set[str]:
    """Numbers, menu paths, quoted words and names in a text, in lower case; step numbers at the head of a line are none."""
    text = re.sub(r"(?m)^(?:Step )?\d+[.:)]\s", "", text)
    return {m.strip(' ."`').lower() for m in _FACT.findall(text)}


def repeats(answer: str, document: str, n: int = 6) -> bool:
    """Whether an answer says a run of n words more often than its article does, once being always allowed."""

    def runs(text: str) -> Counter[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    there = runs(document)
    return any(times > max(1, there[run]) for run, times in runs(answer).items())


def score_answers(samples: Sequence[Sample], answers: Sequence[Answer]) -> AnswerScores:
    """See AnswerScores."""
    wanted = carried = stated = grounded = 0
    for sample, answer in zip(samples, answers, strict=True):
        document = sample.document.lower()
        need = {f for f in facts(sample.answer) if f in document}
        wanted += len(need)
        carried += sum(f in answer.text.lower() for f in need)
        known = " ".join([document, sample.answer.lower(), *(m.content.lower() for m in sample.messages)])
        said = facts(answer.text)
        stated += len(said)
        grounded += sum(f in known for f in said)
    n = max(1, len(answers))
    return AnswerScores(
        ends=sum(a.finish_reason == "stop" for a in answers) / n,
        carried=carried / max(1, wanted),
        grounded=grounded / max(1, stated),
        tokens=sum(a.tokens for a in answers) / n,
    )
