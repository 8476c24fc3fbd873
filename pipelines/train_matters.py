"""Messages with one or two matters, and prompts -> the model that tells where a second matter begins. Knows nothing of MLflow or HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.router_corpus import RouterData, Topical, seen
from router.knowledge import KnowledgeBase
from router.matters import Matters, pairs_in
from router.segment import Segmenter, cuts

C = 1.0
MOST_PROMPTS = 5000
MIN_MESSAGES = 20
# Of messages with one matter, how many may be taken for two.
MAX_FALSE_SPLITS = 0.005


def fit_matters(knowledge: KnowledgeBase, segmenter: Segmenter | None, data: RouterData, seed: int = 0) -> tuple[Matters | None, dict[str, float]]:
    """The model and its figures on the voices that the corpus holds out; None where there is no segmenter, or too little to learn from.

    A message with two matters teaches the cut that has its two articles in order on the sides, the surest of several; one with a single matter, that
    none of its cuts is one.
    """
    told = [m for m in data.matters if not m.held_out]
    if segmenter is None or sum(len(m.topics) == 2 for m in told) < MIN_MESSAGES:
        return None, {}
    prompts = [Topical(r.text, (r.topic,), r.voice) for r in seen(data.prompts) if cuts(r.text)]
    told += Random(seed).sample(prompts, min(MOST_PROMPTS, len(prompts)))
    found = [pairs_in(knowledge, segmenter, m.text) for m in told]
    rows, labels = [], []
    for message, pairs in zip(told, found, strict=True):
        if len(message.topics) == 2:
            right = [p for p in pairs if (p.first, p.second) == message.topics]
            rows += [max(right, key=lambda p: p.features[0]).features] if right else []
            labels += [1] if right else []
        else:
            rows += [p.features for p in pairs]
            labels += [0] * len(pairs)
    if len(set(labels)) < 2:
        return None, {}
    scaler, model = StandardScaler(), LogisticRegression(C=C, max_iter=2000)
    make_pipeline(scaler, model).fit(np.array(rows), labels)
    weights = model.coef_[0] / scaler.scale_
    bias = float(model.intercept_[0] - weights @ scaler.mean_)
    made = Matters(weights, bias)
    single = [max(map(made.score, pairs), default=-np.inf) for m, pairs in zip(told, found, strict=True) if len(m.topics) == 1]
    made.bias -= max(0.0, float(np.quantile(single, 1 - MAX_FALSE_SPLITS, method="lower")))
    held = [Topical(r.text, (r.topic,), r.voice) for r in data.prompts if r.held_out and cuts(r.text)]
    return made, measure_matters(made, knowledge, segmenter, [*(m for m in data.matters if m.held_out), *held])


def measure_matters(made: Matters, knowledge: KnowledgeBase, segmenter: Segmenter, messages: Sequence[Topical]) -> dict[str, float]:
    """Shares: of messages with two matters both found, with their articles, and of those with one that are taken for two; what has no message is left out."""
    best = [made.best(pairs_in(knowledge, segmenter, m.text)) for m in messages]
    two = [b is not None and (b.first, b.second) == m.topics for b, m in zip(best, messages, strict=True) if len(m.topics) == 2]
    one = [b is not None for b, m in zip(best, messages, strict=True) if len(m.topics) == 1]
    return {name: float(np.mean(of)) for name, of in (("two_matters_found", two), ("one_matter_split", one)) if of}
