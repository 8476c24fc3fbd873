"""Conversations and messages with two requests -> how far a turn that tells outweighs those before it, and which cuts are cuts; measured on held-out voices.

What persona a piece of a text speaks of, and whether it tells, is for the cuts what a classifier says that has not seen the author's other texts: one that
has is surer than it will be of anybody's. Knows nothing of MLflow or HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from pipelines.router_corpus import Requests, RouterData, Talk, folds
from router.classifier import PersonaClassifier, sigmoid
from router.policy import PolicySettings, Route
from router.query import Query, query_of
from router.segment import FEATURES, Cut, Segmenter, cuts, features, pieces_of, requests_in, words_around

TRUSTS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Of messages with one request, how many may be split.
MAX_FALSE_SPLITS = 0.02
SEGMENT_C = 1.0
MOST_PROMPTS = 9000
# Words around a cut that are looked at: of so many cuts, and with a weight that matters.
MIN_CUTS = 3
MIN_WORD_WEIGHT = 0.1


def fit_trust(classifier: PersonaClassifier, talks: Sequence[Talk]) -> float:
    """How much a turn must tell to outweigh those before it: the value under which the personas of conversations are most likely."""
    seen = [t for t in talks if not t.held_out]
    if not seen:
        return classifier.trust
    queries, of = [query_of(t.messages) for t in seen], [classifier.personas.index(t.persona) for t in seen]
    kept, likelihood = classifier.trust, {}
    try:
        for classifier.trust in TRUSTS:
            p, _ = classifier.probabilities(queries)
            likelihood[classifier.trust] = float(np.log(p[np.arange(len(seen)), of] + 1e-6).mean())
    finally:
        classifier.trust = kept
    return max(likelihood, key=lambda t: likelihood[t])


def fit_segmenter(
    classifier: PersonaClassifier, data: RouterData, seed: int = 0, unseen_by: Mapping[str, PersonaClassifier] | None = None
) -> Segmenter | None:
    """A segmenter for the classifier; None where the corpus has no messages with two requests.

    unseen_by: voice -> a classifier that was made without it.
    """
    unseen_by = unseen_by or {}
    messages = [r for r in examples(data) if not r.held_out]
    if sum(len(r.parts) == 2 for r in messages) < 20:
        return None
    prompts = [r for r in _told(data) if not r.held_out]
    messages += Random(seed).sample(prompts, min(MOST_PROMPTS, len(prompts)))
    rows, labels, owner, around = [], [], [], []
    for i, message in enumerate(messages):
        if places := cuts(message.text):
            pieces = pieces_of(message.text, places)
            rows.append(features(unseen_by.get(message.voice, classifier), message.text, places, pieces))
            labels += [is_cut(message, c) for c in places]
            around += words_around(pieces)
            owner += [i] * len(places)
    counts = Counter(w for words in around for w in words)
    columns = {w: i for i, w in enumerate(sorted(w for w, n in counts.items() if n >= MIN_CUTS))}
    known = [[columns[w] for w in sorted(words) if w in columns] for words in around]
    ends = np.cumsum([0, *map(len, known)])
    table = sparse.csr_matrix((np.ones(ends[-1]), [c for row in known for c in row], ends), shape=(len(known), len(columns)))
    x, y, of = sparse.hstack([sparse.csr_matrix(np.concatenate(rows)), table]).tocsr(), np.array(labels), np.array(owner)
    # The threshold comes from messages whose author the model had not seen.
    unseen = np.zeros(len(y))
    for fold in folds([messages[i].voice for i in of], seed):
        unseen[fold] = _fit(x[~fold], y[~fold]).decision_function(x[fold])
    highest = np.full(len(messages), -np.inf)
    np.maximum.at(highest, of, unseen)
    single = np.array([len(m.parts) == 1 for m in messages])
    bar = float(np.quantile(highest[single], 1 - MAX_FALSE_SPLITS)) if single.any() else 0.0
    model = _fit(x, y)
    weights = model.coef_[0]
    words = {w: round(float(weights[len(FEATURES) + i]), 4) for w, i in columns.items() if abs(weights[len(FEATURES) + i]) >= MIN_WORD_WEIGHT}
    return Segmenter(weights[: len(FEATURES)], float(model.intercept_[0]), float(sigmoid(np.array([bar]))[0]), words)


def _fit(x: sparse.csr_matrix, y: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=SEGMENT_C, max_iter=3000).fit(x, y)


def examples(data: RouterData) -> list[Requests]:
    """Messages with two requests, and ones with a single request to tell them from: turns of conversations, ones without an article, neutral ones."""
    single = [_single(r.text, r.voice) for r in (*data.uncovered, *data.neutral)]
    single += [_single(m.content, t.voice) for t in data.talks for m in t.messages if m.role == "user"]
    return [*data.requests, *(r for r in single if cuts(r.text))]


def _told(data: RouterData) -> list[Requests]:
    """The prompts that give their sender away, each one request."""
    return [_single(r.text, r.voice) for r in (*data.prompts, *data.personal) if r.tells and not r.profile]


def _single(text: str, voice: str) -> Requests:
    return Requests(text, ((text, ""),), voice)


def is_cut(message: Requests, cut: Cut) -> bool:
    """Whether a cut lies between the two requests; words that only join them may go to either side."""
    if len(message.parts) < 2:
        return False
    first, second = message.parts[0][0], message.parts[1][0]
    end = message.text.index(first) + len(first)
    start = message.text.index(second, max(0, end - len(second)) if message.text.find(second, end) < 0 else end)
    return end - 2 <= cut.end and cut.start <= start + 1


def measure_segments(classifier: PersonaClassifier, segmenter: Segmenter | None, data: RouterData) -> dict[str, float]:
    """On held-out voices: conversations right (all, follow-ups, changes), both requests found in order, and single ones that were split."""
    metrics: dict[str, float] = {}
    talks = [t for t in data.talks if t.held_out]
    if talks:
        p, _ = classifier.probabilities([query_of(t.messages) for t in talks])
        right = np.array([classifier.personas[int(row.argmax())] == t.persona for row, t in zip(p, talks, strict=True)])
        metrics["accuracy_conversation"] = float(right.mean())
        for kind in ("follow_up", "changed"):
            of = np.array([t.kind == kind for t in talks])
            if of.any():
                metrics[f"accuracy_conversation_{kind}"] = float(right[of].mean())
    held = [r for r in examples(data) if r.held_out]
    held += [r for r in _told(data) if r.held_out]
    double, single = ([r for r in held if len(r.parts) == n] for n in (2, 1))
    if segmenter and double:
        found = [[route.persona for _, route in _requests(classifier, segmenter, r)] for r in double]
        metrics["two_requests_found"] = float(np.mean([f == [p for _, p in r.parts] for f, r in zip(found, double, strict=True)]))
        metrics["two_requests_split"] = float(np.mean([len(f) == 2 for f in found]))
    if segmenter and single:
        metrics["single_requests_split"] = float(np.mean([bool(_requests(classifier, segmenter, r)) for r in single]))
    return metrics


def _requests(classifier: PersonaClassifier, segmenter: Segmenter, message: Requests) -> list[tuple[str, Route]]:
    """What the desk would make of a message; whether it is a request at all is measured elsewhere."""
    return requests_in(classifier, segmenter, Query(message.text), PolicySettings(min_in_domain=0.0))
