"""A new adapter against the base and the champion, on the same held-out samples: losses, answers, kinds of request, and how sure one can be.

Knows nothing of MLflow or gates; it returns numbers and tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from persona_models.adapters import Adapter
from persona_models.base_model import BaseModel
from persona_models.errors import TicketError
from persona_models.registry import CHAMPION
from pipelines.dataset import Sample
from pipelines.evaluate import Answer, Applied, generate_answers, score_answers
from pipelines.finetune import encode_sample
from pipelines.training import losses_by_example

NEW, BASE = "new", "base"
RESAMPLES = 2000
# Kinds of request with fewer samples are not reported: their figures would be noise.
MIN_SLICE = 5


@dataclass(frozen=True)
class Judgement:
    """metrics: of the new adapter, as logged. rivals: "base" and "champion" -> their metrics of the same names. slices and samples: tables."""

    metrics: dict[str, float]
    rivals: dict[str, dict[str, float]]
    slices: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """Summed loss (nats) and answer tokens of each sample, under one candidate."""

    sums: np.ndarray
    tokens: np.ndarray

    def mean(self, rows: np.ndarray | None = None) -> float:
        """Nats per answer token, over some samples or all."""
        chosen = slice(None) if rows is None else rows
        return float(self.sums[chosen].sum() / max(1, self.tokens[chosen].sum()))


def judge(
    base: BaseModel,
    samples: Sequence[Sample],
    candidates: Mapping[str, Adapter | None],
    *,
    persona: str,
    manner: str,
    max_tokens: int,
    answer_tokens: int,
    no_repeat: int,
    shown: int,
    seed: int,
) -> Judgement:
    """Judge candidates["new"] against "base" (None) and, where there is one, "champion". `shown` samples are answered as well, in one batch.

    Raises TicketError where no sample fits into max_tokens.
    """
    encoded = [encode_sample(base, s, manner) for s in samples]
    fits = [i for i, (ids, _) in enumerate(encoded) if len(ids) <= min(max_tokens, base.context_tokens)]
    if not fits:
        raise TicketError(
            f"none of {len(samples)} held-out samples fits into {max_tokens} tokens with its article; a version that cannot be judged is none"
        )
    kept = [samples[i] for i in fits]
    losses = {}
    for name, adapter in tqdm(candidates.items(), desc="held-out loss", unit="model"):
        with Applied(base, adapter):
            sums, tokens = losses_by_example(base.model, [encoded[i] for i in fits], base.tokenizer.pad_token_id)
        losses[name] = Losses(np.array(sums), np.array(tokens))
    answered = kept[:shown]
    answers = {
        name: generate_answers(
            base, answered, adapter, persona=persona, manner=manner, max_tokens=answer_tokens, no_repeat=no_repeat, title=f"answers, {name}"
        )
        for name, adapter in candidates.items()
    }
    rivals = {name: _metrics(losses[name], answered, answers[name]) for name in candidates}
    metrics = rivals.pop(NEW)
    # The gain of the personalisation papers, in percent of the base's figure; a lower loss is a gain.
    for name, gain in (("loss", "gain"), ("chrf", "gain_chrf"), ("rougeL", "gain_rougeL")):
        theirs, ours = rivals[BASE][f"eval/{name}"], metrics[f"eval/{name}"]
        if theirs:
            metrics[f"eval/{gain}"] = 100 * (ours - theirs) / theirs * (-1 if name == "loss" else 1)
    metrics["eval/base_loss"] = losses[BASE].mean()
    rival = CHAMPION if CHAMPION in candidates else BASE
    if CHAMPION in candidates:
        metrics["eval/champion_loss"] = losses[CHAMPION].mean()
    low, high = bootstrap(losses[NEW], losses[rival], seed)
    metrics |= {"eval/delta": losses[NEW].mean() - losses[rival].mean(), "eval/delta_low": low, "eval/delta_high": high}
    slices = _slices(kept, losses)
    for row in slices:
        if row["kind"] != "topic":
            metrics[f"slice/{row['kind']}_{row['value']}_loss"] = row[NEW]
            for name in rivals:
                rivals[name][f"slice/{row['kind']}_{row['value']}_loss"] = row[name]
    columns = {"prompt": [s.messages[-1].content for s in answered], "answer": [a.text for a in answers[NEW]]}
    columns |= {name: [a.text for a in answers[name]] for name in (CHAMPION, BASE) if name in answers}
    columns |= {"reference": [s.answer for s in answered], "article": [s.document for s in answered]}
    return Judgement(metrics, rivals, slices, columns)


def bootstrap(new: Losses, rival: Losses, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the difference in loss (new - rival, nats a token): samples drawn with replacement, both candidates on the same ones."""
    rng = np.random.default_rng(seed)
    n = len(new.sums)
    drawn = rng.integers(0, n, (resamples, n))
    tokens = new.tokens[drawn].sum(1)
    differences = (new.sums[drawn].sum(1) - rival.sums[drawn].sum(1)) / np.maximum(1, tokens)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def likeness(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """chrF (sacrebleu, 0..100) over all answers, and the mean ROUGE-L F1 (rouge-score, 0..1)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    chrf = CHRF().corpus_score(list(answers), [list(references)]).score if answers else 0.0
    return {"chrf": float(chrf), "rougeL": sum(rouge) / max(1, len(rouge))}


def _metrics(losses: Losses, answered: Sequence[Sample], answers: Sequence[Answer]) -> dict[str, float]:
    scores = asdict(score_answers(answered, answers)) | likeness([a.text for a in answers], [s.answer for s in answered])
    seconds, tokens = sum(a.seconds for a in answers), sum(a.tokens for a in answers)
    # An answer without a step where the article has steps sends the person on to the desk.
    refused = [not _has_step(a.text) for s, a in zip(answered, answers, strict=True) if _has_step(s.document) and _has_step(s.answer)]
    scores |= {"refusals": sum(refused) / max(1, len(refused)), "ms_per_token": 1000 * seconds / max(1, tokens)}
    return {"eval/loss": losses.mean(), "eval/ppl": math.exp(min(50.0, losses.mean()))} | {f"eval/{k}": v for k, v in scores.items()}


def _has_step(text: str) -> bool:
    return "1. " in text


def _slices(samples: Sequence[Sample], losses: Mapping[str, Losses]) -> list[dict[str, Any]]:
    """Loss by kind of request: topic, register, tenure, length."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for i, sample in enumerate(samples):
        for kind, value in {"topic": sample.topic, **sample.traits}.items():
            if value:
                kinds.setdefault((kind, value), []).append(i)
    return [
        {"kind": kind, "value": value, "samples": len(rows), **{name: found.mean(np.array(rows)) for name, found in losses.items()}}
        for (kind, value), rows in sorted(kinds.items())
        if len(rows) >= MIN_SLICE
    ]
