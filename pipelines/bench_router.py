"""The router beside others on the same held-out prompts: accuracy, calibration, what is declined or left open, and time per prompt.

Every way but the shipped router is given the same training prompts. What is not installed is left out, with a note. Knows nothing of MLflow.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from persona_models.encoder import load_encoder
from pipelines.compose import CORPUS
from pipelines.router_corpus import Labelled, RouterData, read_router_corpus, seen
from pipelines.train_router import fit_classifier
from router.classifier import PersonaClassifier
from router.loading import load_classifier
from router.policy import decide
from router.query import Query

# Dense vectors of the training prompts must fit into memory: semantic-router keeps them so.
TRAINING = 5000
WARM_UP = 20
# (persona, probability; the persona is None where nobody is picked) of one prompt
Picked = tuple[str | None, float]


@dataclass(frozen=True)
class Contestant:
    """One way to route: prompt -> (persona or None, its probability)."""

    name: str
    pick: Callable[[str], Picked]
    declines: Callable[[str], bool] | None = None


def bench_router(config: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per way, and what was left out."""
    personas = tuple(p.id for p in config.catalogue())
    data = read_router_corpus(config.corpus or CORPUS, personas)
    rows = [r for r in seen((*data.prompts, *data.personal)) if r.tells and not r.profile]
    training = random.Random(0).sample(rows, min(TRAINING, len(rows)))
    held = [r for r in (*data.prompts, *data.personal) if r.held_out and r.tells and not r.profile]
    neutral, strangers = ([r for r in part if r.held_out] for part in (data.neutral, data.out_of_domain))
    results, notes = [], [f"{len(training)} training prompts, {len(held)} held out, by other authors"]
    for made in _contestants(config, data, training, personas, notes):
        results.append(_measure(made, held, neutral, strangers, personas))
    return results, notes


def _contestants(config: Any, data: RouterData, training: Sequence[Labelled], personas: Sequence[str], notes: list[str]) -> Iterator[Contestant]:
    texts, labels = [r.text for r in training], [r.persona for r in training]
    most = Counter(labels).most_common(1)[0]
    yield Contestant("always the most frequent", lambda text: (most[0], most[1] / len(labels)))
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    vectors = vectorizer.fit_transform(texts)
    yield Contestant("15 nearest prompts, TF-IDF", _nearest(vectors, labels, lambda text: vectorizer.transform([text])))
    encoder = load_encoder(config.router.encoder) if config.router.encoder else None
    if encoder:
        encoder.prepare(texts)
        dense = np.stack([encoder.encode(t) for t in texts])
        yield Contestant("15 nearest prompts, sentence encoder", _nearest(dense, labels, lambda text: encoder.encode(text)[None]))
    else:
        notes.append("left out sentence encoders: router.encoder is not set")
    for name, package, make in (
        ("semantic-router, TF-IDF encoder", "semantic_router", _semantic_router),
        ("LiteLLM's complexity router", "litellm", _complexity_router),
    ):
        if importlib.util.find_spec(package) is None:
            notes.append(f"left out {name}: {package} is not installed")
            continue
        try:
            yield Contestant(name, make(training, personas))
        except Exception as e:
            # Somebody else's code, of whatever release is installed.
            notes.append(f"left out {name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    kept = set(map(id, training))
    part = replace(
        data, prompts=tuple(r for r in data.prompts if id(r) in kept), personal=tuple(r for r in data.personal if id(r) in kept or r.profile)
    )
    yield _ours("deskroute, the same prompts", fit_classifier(part, personas), config)
    if encoder:
        yield _ours("deskroute, the same prompts, sentence encoder", fit_classifier(part, personas, encoder=encoder), config)
    yield _ours("deskroute, as it is in force", load_classifier(config), config)


def _nearest(vectors: Any, labels: Sequence[str], vector_of: Callable[[str], Any]) -> Callable[[str], Picked]:
    """The share of personas among the nearest of the training prompts."""
    neighbours = KNeighborsClassifier(15, metric="cosine").fit(vectors, labels)

    def pick(text: str) -> Picked:
        p = neighbours.predict_proba(vector_of(text))[0]
        return str(neighbours.classes_[int(p.argmax())]), float(p.max())

    return pick


def _ours(name: str, classifier: PersonaClassifier, config: Any) -> Contestant:
    def pick(text: str) -> Picked:
        scores = classifier.score([Query(text)])[0]
        best = max(scores.personas, key=lambda p: scores.personas[p])
        # Told apart from being declined, which is measured on its own.
        route = decide(replace(scores, in_domain=1.0), config.policy)
        return (best if route.decision == "persona" else None), scores.personas[best]

    def declines(text: str) -> bool:
        return decide(classifier.score([Query(text)])[0], config.policy).decision == "decline"

    return Contestant(name, pick, declines)


def _semantic_router(training: Sequence[Labelled], personas: Sequence[str]) -> Callable[[str], Picked]:
    """Its sparse encoder alone, the mean over the five most alike: a dense encoder needs a model that is not here."""
    from semantic_router import Route
    from semantic_router.encoders import DenseEncoder, TfidfEncoder
    from semantic_router.routers import IndexedRouter

    class Nothing(DenseEncoder):  # type: ignore[misc]
        name: str = "nothing"

        def __call__(self, docs: list[Any]) -> list[list[float]]:
            return [[1.0] for _ in docs]

    routes = [Route(name=p, utterances=[r.text for r in training if r.persona == p]) for p in personas]
    router = IndexedRouter(encoder=Nothing(), routes=routes, sparse_encoder=TfidfEncoder(), alpha=0.0)

    def pick(text: str) -> Picked:
        choice = router(text)
        return choice.name, float(choice.confidence or 0.0)

    return pick


def _complexity_router(training: Sequence[Labelled], personas: Sequence[str]) -> Callable[[str], Picked]:
    """It knows no personas but four tiers of difficulty: each stands for the persona that most of its training prompts are of."""
    from unittest.mock import MagicMock

    from litellm.router_strategy.complexity_router.complexity_router import ComplexityRouter

    router = ComplexityRouter(model_name="bench", ctx=MagicMock())
    tiers: dict[Any, Counter[str]] = {}
    for row in training:
        tiers.setdefault(router.classify(row.text, None)[0], Counter())[row.persona] += 1

    def pick(text: str) -> Picked:
        counts = tiers.get(router.classify(text, None)[0]) or Counter({personas[0]: 1})
        persona, n = counts.most_common(1)[0]
        return persona, n / counts.total()

    return pick


def _measure(
    way: Contestant, held: Sequence[Labelled], neutral: Sequence[Labelled], strangers: Sequence[Labelled], personas: Sequence[str]
) -> dict[str, Any]:
    for prompt in held[:WARM_UP]:
        way.pick(prompt.text)
    spent, picked = [], []
    for prompt in held:
        began = time.perf_counter()
        picked.append(way.pick(prompt.text))
        spent.append(1000 * (time.perf_counter() - began))
    label = [r.persona for r in held]
    right = np.array([p == of for (p, _), of in zip(picked, label, strict=True)])
    sure = np.array([c for _, c in picked])
    decided = np.array([p is not None for p, _ in picked])
    bins = np.minimum((sure * 10).astype(int), 9)
    # Of those that were decided: a persona that is not picked has no probability to be calibrated.
    error = sum(abs(float(sure[of].mean()) - float(right[of].mean())) * of.sum() for b in range(10) if (of := (bins == b) & decided).any()) / max(
        1, decided.sum()
    )
    row: dict[str, Any] = {
        "router": way.name,
        "accuracy": round(float(right.mean()), 3),
        "of the decided": round(float(right[decided].mean()), 3) if decided.any() else 0.0,
        "macro F1": round(float(f1_score(label, [str(p) for p, _ in picked], labels=list(personas), average="macro", zero_division=0)), 3),
        "calibration error": round(float(error), 3),
        "left open": round(float(1 - decided.mean()), 3),
        "neutral left open": round(float(np.mean([way.pick(r.text)[0] is None for r in neutral])), 3) if neutral else 0.0,
    }
    if way.declines:
        row |= {
            "declined": round(float(np.mean([way.declines(r.text) for r in held])), 3),
            "strangers declined": round(float(np.mean([way.declines(r.text) for r in strangers])), 3),
        }
    return row | {
        "p50 ms": round(float(np.percentile(spent, 50)), 3),
        "p99 ms": round(float(np.percentile(spent, 99)), 3),
        "prompts/s": round(1000 * len(spent) / sum(spent)),
    }
