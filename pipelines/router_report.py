"""How a trained router does on the held-out voices: routing, in-domain, retrieval, latency. Knows nothing of training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from pipelines.router_corpus import Labelled, RouterData
from pipelines.train_segments import measure_segments
from router.classifier import PersonaClassifier
from router.knowledge import KnowledgeBase
from router.policy import PolicySettings, decide
from router.query import Query
from router.segment import Segmenter

RELIABILITY_BINS = 10
# Registers with fewer held-out texts are not reported.
MIN_SLICE = 20
TYPO_EVERY = 30


@dataclass(frozen=True)
class RouterReport:
    """How a trained router did on the held-out voices."""

    version: str
    metrics: dict[str, float]
    personas: tuple[str, ...]
    confusion: np.ndarray  # (P, P) counts, rows the true persona
    reliability: dict[str, np.ndarray]  # from, count, confidence, accuracy; one value per bin
    retrieval_confusions: list[tuple[str, str, int]]  # topic, article found instead, how often
    errors: list[dict[str, Any]]
    coverage: list[tuple[float, float]] = field(default_factory=list)  # (share decided, accuracy), the surest first
    rival: dict[str, float] | None = None  # the metrics of another router on the same held-out voices


def measure(data: RouterData, classifier: PersonaClassifier, knowledge: KnowledgeBase, asked: Sequence[Labelled] | None = None) -> RouterReport:
    """Metrics on the held-out voices. Shares are 0 to 1, times in ms; a metric without anything to measure it on is left out.

    asked: requests with their articles, where they are others than `data`'s prompts: labels of a company's own leave the articles as they are.
    """
    personas = list(classifier.personas)
    known = [r for r in (*data.prompts, *data.personal) if r.held_out and r.tells and not r.profile]
    metrics: dict[str, float] = {}
    confusion = np.zeros((len(personas), len(personas)), dtype=np.int64)
    reliability: dict[str, np.ndarray] = {}
    errors: list[dict[str, Any]] = []
    coverage: list[tuple[float, float]] = []
    if known:
        probabilities, _ = classifier.probabilities([r.text_only for r in known])
        label = np.array([personas.index(r.persona) for r in known])
        guess, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
        np.add.at(confusion, (label, guess), 1)
        reliability = _reliability(sure, guess == label)
        fell = _fell_back(classifier, known)
        metrics |= {
            "accuracy_text": float((guess == label).mean()),
            "macro_f1_text": float(f1_score(label, guess, average="macro", labels=range(len(personas)), zero_division=0)),
            "ece_text": expected_calibration_error(sure, guess == label),
            "brier_text": float(((probabilities - np.eye(len(personas))[label]) ** 2).sum(axis=1).mean()),
            "fallback_of_known": float(fell.mean()),
            "accuracy_at_threshold": float((guess == label)[~fell].mean()) if not fell.all() else 0.0,
            "accuracy_at_80": float((guess == label)[np.argsort(-sure, kind="stable")[: int(0.8 * len(sure))]].mean()),
        }
        surest = (guess == label)[np.argsort(-sure, kind="stable")]
        shares = np.arange(1, len(surest) + 1) / len(surest)
        coverage = [
            (float(shares[i]), float(surest[: i + 1].mean())) for i in range(max(0, len(surest) // 50 - 1), len(surest), max(1, len(surest) // 50))
        ]
        for register in sorted({r.register for r in known if r.register}):
            of = np.array([r.register == register for r in known])
            if of.sum() >= MIN_SLICE:
                metrics[f"slice_{register}_accuracy"] = float((guess == label)[of].mean())
        for i in np.flatnonzero(guess != label):
            errors.append({"kind": "persona", "text": known[i].text, "is": known[i].persona, "got": personas[guess[i]], "confidence": float(sure[i])})
        metrics |= _steadiness(classifier, [r.text for r in known], [personas[i] for i in guess])
    with_profile = [r for r in data.personal if r.held_out and r.profile]
    if with_profile:
        probabilities, _ = classifier.probabilities([r.query for r in with_profile])
        right = [personas[int(p.argmax())] == r.persona for p, r in zip(probabilities, with_profile, strict=True)]
        alone, _ = classifier.probabilities([r.text_only for r in with_profile])
        metrics["accuracy_profile"] = float(np.mean(right))
        metrics["accuracy_profile_text_only"] = float(
            np.mean([personas[int(p.argmax())] == r.persona for p, r in zip(alone, with_profile, strict=True)])
        )
    neutral = [r for r in data.neutral if r.held_out]
    if neutral:
        metrics["fallback_of_neutral"] = float(_fell_back(classifier, neutral).mean())
    metrics |= _measure_in_domain(classifier, [*known, *with_profile, *neutral], [r for r in data.out_of_domain if r.held_out], errors)
    metrics |= measure_segments(classifier, Segmenter.from_facts(classifier.segments), data)
    more, confusions = _measure_retrieval(data, data.prompts if asked is None else asked, knowledge, errors)
    return RouterReport(
        "", metrics | more | _latency(classifier, knowledge, known), tuple(personas), confusion, reliability, confusions, errors, coverage
    )


def _steadiness(classifier: PersonaClassifier, texts: Sequence[str], before: Sequence[str]) -> dict[str, float]:
    """How often the leading persona stays the same when a text is shouted, mistyped, or dressed as a mail."""
    steady = {}
    for name, change in CHANGES.items():
        p, _ = classifier.probabilities([Query(change(t)) for t in texts])
        steady[f"unchanged_{name}"] = float(np.mean([classifier.personas[int(row.argmax())] == b for row, b in zip(p, before, strict=True)]))
    return steady


def mistyped(text: str) -> str:
    """One in TYPO_EVERY characters lost, doubled or exchanged with its neighbour; of the same text always the same ones."""
    random, characters = Random(text), list(text)
    for i in range(len(characters) - 1):
        if characters[i].isalpha() and random.random() < 1 / TYPO_EVERY:
            kind = random.randrange(3)
            if kind == 0:
                characters[i] = ""
            elif kind == 1:
                characters[i] *= 2
            else:
                characters[i], characters[i + 1] = characters[i + 1], characters[i]
    return "".join(characters)


# What a text may look like without saying anything else.
CHANGES: dict[str, Callable[[str], str]] = {
    "case": str.upper,
    "typos": mistyped,
    "mail": lambda text: f"Hello team,\n\n{text}\n\nThanks a lot and kind regards,\nAlex",
}


def _fell_back(classifier: PersonaClassifier, rows: Sequence[Labelled]) -> np.ndarray:
    """Which texts nobody's persona is picked for (N,)."""
    settings = PolicySettings(min_in_domain=0.0)
    return np.array([decide(s, settings).decision == "fallback" for s in classifier.score([r.text_only for r in rows])])


def _reliability(sure: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Equal-width bins of the leading probability: lower edge, count, mean confidence and accuracy (0 in an empty bin)."""
    bins = np.minimum((sure * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    count = np.bincount(bins, minlength=RELIABILITY_BINS)
    some = np.maximum(count, 1)
    return {
        "from": np.arange(RELIABILITY_BINS) / RELIABILITY_BINS,
        "count": count,
        "confidence": np.bincount(bins, sure, minlength=RELIABILITY_BINS) / some,
        "accuracy": np.bincount(bins, right.astype(float), minlength=RELIABILITY_BINS) / some,
    }


def expected_calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Mean distance (0..1) between the leading probability (N,) and how often it was right, over bins of equal width."""
    bins = _reliability(sure, right)
    return float((bins["count"] * np.abs(bins["confidence"] - bins["accuracy"])).sum() / len(sure))


def _measure_in_domain(
    classifier: PersonaClassifier, requests: Sequence[Labelled], strangers: Sequence[Labelled], errors: list[dict[str, Any]]
) -> dict[str, float]:
    _, inside = classifier.probabilities([r.text_only for r in requests])
    _, outside = classifier.probabilities([r.text_only for r in strangers])
    metrics = {}
    if len(inside):
        metrics["false_decline_rate"] = float((inside < classifier.min_in_domain).mean())
    if len(outside):
        metrics["out_of_domain_declined"] = float((outside < classifier.min_in_domain).mean())
    if len(inside) and len(outside):
        metrics["in_domain_auroc"] = float(roc_auc_score([1] * len(inside) + [0] * len(outside), np.concatenate([inside, outside])))
    for row, score in zip(requests, inside, strict=True):
        if score < classifier.min_in_domain:
            errors.append({"kind": "declined", "text": row.text, "is": row.topic or "a request", "got": "decline", "confidence": float(1 - score)})
    for row, score in zip(strangers, outside, strict=True):
        if score >= classifier.min_in_domain:
            errors.append({"kind": "let_in", "text": row.text, "is": row.kind, "got": "a request", "confidence": float(score)})
    return metrics


def _measure_retrieval(
    data: RouterData, prompts: Sequence[Labelled], knowledge: KnowledgeBase, errors: list[dict[str, Any]]
) -> tuple[dict[str, float], list[tuple[str, str, int]]]:
    asked = [r for r in prompts if r.held_out]
    strangers = [r for r in data.out_of_domain if r.held_out]
    uncovered = [r for r in data.uncovered if r.held_out]
    bar = knowledge.calibration.threshold
    metrics: dict[str, float] = {}
    wrong: Counter[tuple[str, str]] = Counter()
    if asked:
        row_of = {a.id: i for i, a in enumerate(knowledge.articles)}
        measured = [knowledge.measure(r.text) for r in asked]
        products = np.stack([m[0] if m else np.zeros(len(knowledge.articles)) for m in measured])
        label = np.array([row_of[r.topic] for r in asked])
        order = np.argsort(-products, axis=1, kind="stable")
        first = order[:, 0] == label
        best = np.array([max((m.score for m in knowledge.match(r.text, 1)), default=0.0) for r in asked])
        metrics |= {
            "retrieval_top1": float(first.mean()),
            "retrieval_top3": float((order[:, :3] == label[:, None]).any(axis=1).mean()),
            "article_lost": float((best[first] < bar).mean()) if first.any() else 0.0,
            "right_article_served": float((first & (best >= bar)).mean()),
            "wrong_article_served": float((~first & (best >= bar)).mean()),
        }
        for i in np.flatnonzero(~first):
            found = knowledge.articles[order[i, 0]].id
            wrong[asked[i].topic, found] += 1
            errors.append({"kind": "article", "text": asked[i].text, "is": asked[i].topic, "got": found, "confidence": float(best[i])})
    if uncovered:
        metrics["no_article_uncovered"] = float(np.mean([knowledge.best(r.text) is None for r in uncovered]))
    if strangers:
        metrics["no_article_out_of_domain"] = float(np.mean([knowledge.best(r.text) is None for r in strangers]))
    return metrics, [(topic, found, n) for (topic, found), n in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))]


def _latency(classifier: PersonaClassifier, knowledge: KnowledgeBase, rows: Sequence[Labelled]) -> dict[str, float]:
    """Scores and article of one request after the other, in ms."""
    spent = []
    for row in rows[:300]:
        start = time.perf_counter()
        classifier.score([row.query])
        knowledge.best(row.text)
        spent.append((time.perf_counter() - start) * 1e3)
    return {"latency_p50_ms": float(np.percentile(spent, 50)), "latency_p95_ms": float(np.percentile(spent, 95))} if spent else {}
