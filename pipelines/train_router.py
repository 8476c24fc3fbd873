"""Corpus -> features -> persona scores, in-domain score and article index, each calibrated on authors it has not seen -> router artefact.

Prompts of one author resemble each other more than prompts about one topic do, so every split here is by voice: the voices named `held_...` are
never trained on and give the metrics; temperatures, thresholds and term weights come from scores that a prompt got without its author's others.
This file knows nothing of the command line, of MLflow or of HTTP.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import sparse
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from persona_models.errors import InputError, WorkError
from router.article import Article, read_article
from router.classifier import MANIFEST, PersonaClassifier, sigmoid, softmax
from router.features import FeatureSpace, Profile, Query, TextSpace
from router.knowledge import Calibration, KnowledgeBase, article_vectors, text_of
from router.policy import PolicySettings

HELD_OUT = "held_"
FOLDS = 8
# Strength of the fits (scikit-learn's C) and of the pull of term weights towards 1; chosen on voices left out of training.
PERSONA_C = 3.0
IN_DOMAIN_C = 30.0
PROFILE_WEIGHT = 2.0
TERM_PULL = 1.0
# What calibration may cost: the share of real requests declined, and of right articles withheld.
MAX_FALSE_DECLINES = 0.01
MAX_LOST_ARTICLES = 0.01
RELIABILITY_BINS = 10
PHRASES_IN_A_TEXT = 6


@dataclass(frozen=True)
class Labelled:
    """One text to learn from or to measure on; what is not known of it is empty."""

    text: str
    voice: str
    persona: str = ""
    topic: str = ""
    register: str = ""
    kind: str = ""
    profile: Profile = field(default_factory=Profile)

    @property
    def held_out(self) -> bool:
        return self.voice.startswith(HELD_OUT)

    @property
    def query(self) -> Query:
        return Query(self.text, self.profile)

    @property
    def text_only(self) -> Query:
        return Query(self.text)


@dataclass(frozen=True)
class RouterData:
    """The router's corpus. `prompts` have a topic; `personal` have none, some of them a profile; `neutral` give nobody away."""

    articles: tuple[Article, ...]
    values: Mapping[str, str]
    prompts: tuple[Labelled, ...]
    personal: tuple[Labelled, ...]
    neutral: tuple[Labelled, ...]
    out_of_domain: tuple[Labelled, ...]
    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # topic -> words and turns by which people speak of it


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


def read_router_corpus(corpus_dir: Path, personas: Sequence[str] = ()) -> RouterData:
    """Read articles, prompts and the `router/` files; all but articles and prompts may be missing.

    Raises WorkError that names file and line for what is malformed, has an empty text or an unknown persona, and for a corpus without prompts.
    """
    articles = tuple(read_article(path, tuple(personas)) for path in sorted((corpus_dir / "articles").glob("*.md")))
    known = {a.id for a in articles}
    prompts = []
    for path in sorted((corpus_dir / "prompts").glob("*.jsonl")):
        if path.stem in known:
            prompts += [replace(row, topic=path.stem) for row in _rows(path, personas, needs_persona=True)]
    if not prompts:
        raise WorkError(f"{corpus_dir}: no prompts/<topic>.jsonl with an article of the same name; there is nothing to train the router on")
    router = corpus_dir / "router"
    personal = [*_rows(router / "persona.jsonl", personas, needs_persona=True), *_rows(router / "profiles.jsonl", personas, needs_persona=True)]
    return RouterData(
        articles=articles,
        values=_first_values(corpus_dir / "slots.yaml"),
        prompts=tuple(prompts),
        personal=tuple(personal),
        neutral=tuple(_rows(router / "neutral.jsonl", personas)),
        out_of_domain=tuple(_rows(router / "out_of_domain.jsonl", personas)),
        phrases={p.stem: _lines(p) for p in sorted((corpus_dir / "phrases").glob("*.txt")) if p.stem in known},
    )


def train_router(corpus_dir: Path, out_dir: Path, personas: Sequence[str], seed: int = 0) -> RouterReport:
    """Train, measure on the held-out voices, and put the artefact in place of what `out_dir` held.

    The new folder appears whole or not at all; its manifest.json lists the digest of every file. Raises WorkError for a corpus that cannot be
    trained on.
    """
    data = read_router_corpus(corpus_dir, personas)
    classifier = fit_classifier(data, personas, seed)
    knowledge = fit_knowledge(data, seed)
    report = measure(data, classifier, knowledge)
    version = _write(out_dir, classifier, knowledge, report.metrics)
    return replace(report, version=version)


def fit_classifier(data: RouterData, personas: Sequence[str], seed: int = 0) -> PersonaClassifier:
    """Fit the persona model and the in-domain model, calibrate both on scores of voices left out. Raises WorkError for a persona without prompts."""
    rows = _seen((*data.prompts, *data.personal))
    queries = [r.query for r in rows]
    missing = set(personas) - {r.persona for r in rows}
    if missing:
        raise WorkError(f"the corpus has no training prompts for {', '.join(sorted(missing))}; add some under prompts/ or router/persona.jsonl")
    neutral = _seen(data.neutral)
    strangers = _seen(data.out_of_domain)
    everybody = list(dict.fromkeys(r.text for r in (*rows, *neutral, *strangers)))
    space = FeatureSpace.fit(queries, TextSpace.fit(everybody), profile_weight=PROFILE_WEIGHT)
    label = np.array([list(personas).index(r.persona) for r in rows])
    # What came with a profile says nothing by itself ("is the wifi down?"): without it, it is one more neutral text. Taught with its sender's
    # persona instead, it only adds noise: 0.19 of such texts from unseen authors were right, no better than chance.
    x, undecided = space.rows(queries), space.rows(r.text_only for r in (*neutral, *(r for r in rows if r.profile)))

    unseen = np.zeros((len(rows), len(personas)))
    for fold in _folds([r.voice for r in rows], seed):
        w, b = _fit_personas(x[~fold], label[~fold], undecided, len(personas))
        unseen[fold] = x[fold] @ w + b
    temperature = _temperature(unseen, label)
    weights, bias = _fit_personas(x, label, undecided, len(personas))

    request = np.array([1] * (len(rows) + len(neutral)) + [0] * len(strangers))
    inside, inside_bias, threshold = np.zeros(len(space)), 10.0, 0.0
    if strangers and len({r.voice for r in strangers}) > 1:
        texts = [*rows, *neutral, *strangers]
        inside, inside_bias, threshold = _fit_in_domain(space, texts, request, seed)
    return PersonaClassifier(space, personas, np.column_stack([weights, inside]), np.append(bias, inside_bias), temperature, threshold)


def fit_knowledge(data: RouterData, seed: int = 0) -> KnowledgeBase:
    """Index the articles with the prompts of the training voices; learn one weight per term and the calibration of scores."""
    seen = _seen(data.prompts)
    values, articles = data.values, data.articles
    phrases = [Labelled(text, "phrases", topic=topic) for topic, lines in data.phrases.items() for text in _grouped(lines)]
    everything = [*(text_of(a, values) for a in articles), *(r.text for r in (*seen, *phrases))]
    space = TextSpace.fit(everything, min_grams=2, max_words=30_000, max_grams=30_000)
    row_of = {a.id: i for i, a in enumerate(articles)}
    label = np.array([row_of[r.topic] for r in seen])
    x = space.rows(r.text for r in seen) / np.sqrt(2.0)
    folds = []
    for fold in _folds([r.voice for r in seen], seed):
        others = _by_topic([*(r for r, out in zip(seen, fold, strict=True) if not out), *phrases])
        folds.append((fold, article_vectors(articles, others, space, values)))
    weights, sharpness = _term_weights(x, label, folds)

    unseen = np.zeros((len(seen), len(articles)))
    for fold, vectors in folds:
        unseen[fold] = (x[fold] @ vectors.multiply(weights).T).toarray()
    own = x.multiply(article_vectors(articles, {}, space, values)[label]) @ weights
    gain = float(np.median(unseen[np.arange(len(seen)), label]) / max(float(np.median(own)), 1e-9))
    start = Calibration(slope=sharpness, own_text_gain=gain)
    knowledge = KnowledgeBase.build(articles, _by_topic([*seen, *phrases]), values=values, space=space, term_weights=weights, calibration=start)
    strangers = [knowledge.products(r.text) for r in _seen(data.out_of_domain)]
    knowledge.calibration = _calibrate(start, unseen, label, np.array(strangers).reshape(-1, len(articles)))
    return knowledge


def measure(data: RouterData, classifier: PersonaClassifier, knowledge: KnowledgeBase) -> RouterReport:
    """Metrics on the held-out voices. Shares are 0 to 1, times in ms; a metric without anything to measure it on is left out."""
    personas = list(classifier.personas)
    known = [r for r in (*data.prompts, *data.personal) if r.held_out and not r.profile]
    metrics: dict[str, float] = {}
    confusion = np.zeros((len(personas), len(personas)), dtype=np.int64)
    reliability: dict[str, np.ndarray] = {}
    errors: list[dict[str, Any]] = []
    if known:
        probabilities, _ = classifier.probabilities([r.text_only for r in known])
        label = np.array([personas.index(r.persona) for r in known])
        guess, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
        np.add.at(confusion, (label, guess), 1)
        reliability = _reliability(sure, guess == label)
        bar = PolicySettings().min_confidence
        metrics |= {
            "accuracy_text": float((guess == label).mean()),
            "macro_f1_text": float(f1_score(label, guess, average="macro", labels=range(len(personas)), zero_division=0)),
            "ece_text": float((reliability["count"] * np.abs(reliability["confidence"] - reliability["accuracy"])).sum() / len(known)),
            "brier_text": float(((probabilities - np.eye(len(personas))[label]) ** 2).sum(axis=1).mean()),
            "coverage_at_threshold": float((sure >= bar).mean()),
            "accuracy_at_threshold": float((guess == label)[sure >= bar].mean()) if (sure >= bar).any() else 0.0,
        }
        for i in np.flatnonzero(guess != label):
            errors.append({"kind": "persona", "text": known[i].text, "is": known[i].persona, "got": personas[guess[i]], "confidence": float(sure[i])})
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
        metrics["neutral_below_threshold"] = float(
            (classifier.probabilities([r.text_only for r in neutral])[0].max(axis=1) < PolicySettings().min_confidence).mean()
        )
    metrics |= _measure_in_domain(classifier, [*known, *with_profile, *neutral], [r for r in data.out_of_domain if r.held_out], errors)
    more, confusions = _measure_retrieval(data, knowledge, errors)
    return RouterReport("", metrics | more | _latency(classifier, knowledge, known), tuple(personas), confusion, reliability, confusions, errors)


def _rows(path: Path, personas: Sequence[str], *, needs_persona: bool = False) -> list[Labelled]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise WorkError(f"{path}: cannot be read: {e}") from None
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, persona = str(row["text"]).strip(), str(row["persona"]) if needs_persona else ""
            profile = Profile.from_metadata(row.get("profile") or {})
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as e:
            raise WorkError(f"{path}:{n}: not a line of this file ({type(e).__name__}: {e})") from None
        if not text or (needs_persona and personas and persona not in personas):
            raise WorkError(f"{path}:{n}: empty text, or {persona!r} is no persona of the catalogue ({', '.join(personas)})")
        voice = str(row.get("voice") or f"{path.stem}_{n}")
        rows.append(Labelled(text, voice, persona, register=str(row.get("register", "")), kind=str(row.get("kind", "")), profile=profile))
    return rows


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise WorkError(f"{path}: cannot be read: {e}") from None


def _first_values(path: Path) -> dict[str, str]:
    try:
        slots = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(name): str(options[0]) for name, options in slots.items()}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, LookupError, TypeError) as e:
        raise WorkError(f"{path}: must map slot names to lists of values ({e})") from None


def _seen(rows: Sequence[Labelled]) -> list[Labelled]:
    return [r for r in rows if not r.held_out]


def _grouped(lines: Sequence[str]) -> list[str]:
    """Short phrases joined to texts about as long as a prompt; alone, a vector of length 1 would weigh each of its three words far too much."""
    return [" ; ".join(lines[i : i + PHRASES_IN_A_TEXT]) for i in range(0, len(lines), PHRASES_IN_A_TEXT)]


def _by_topic(rows: Sequence[Labelled]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        texts[row.topic].append(row.text)
    return texts


def _folds(voices: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    """Masks (N,) of up to FOLDS disjoint parts, every voice whole in one of them."""
    names = sorted(set(voices))
    order = np.random.default_rng(seed).permutation(len(names))
    part = {name: int(order[i]) % min(FOLDS, len(names)) for i, name in enumerate(names)}
    parts = np.array([part[v] for v in voices])
    for n in range(min(FOLDS, len(names))):
        yield parts == n


def _fit_personas(x: sparse.csr_matrix, label: np.ndarray, neutral: sparse.csr_matrix, n_personas: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, P) and bias (P,): one model per persona against the others.

    A neutral text stands on either side of each, which teaches the models to stay undecided about it.
    """
    weights, bias = np.zeros((x.shape[1], n_personas)), np.full(n_personas, -5.0)
    for persona in range(n_personas):
        mine = label == persona
        # A fold may lack a persona altogether; it then stays unlikely.
        if mine.any() and not mine.all():
            weights[:, persona], bias[persona] = _fit_one(x, mine, neutral)
    return weights, bias


def _fit_one(x: sparse.csr_matrix, positive: np.ndarray, undecided: sparse.csr_matrix) -> tuple[np.ndarray, float]:
    """Weights (F,) and bias of a two-class model, both classes counting alike.

    Every feature is first multiplied by the logarithm of how much more often it occurs in the one class than in the other (Wang and Manning 2012,
    "Baselines and bigrams"): words that separate the classes across many authors then need less weight than an author's habits. Measured here on
    voices left out: 0.70 of personas right, against 0.66 for a softmax regression on the same features.
    """
    present = (x > 0).astype(np.float64)
    scale = positive.sum() / (~positive).sum()
    inside = np.asarray(present[positive].sum(axis=0)).ravel() + 1.0
    outside = np.asarray(present[~positive].sum(axis=0)).ravel() * scale + 1.0
    ratio = np.log((inside / inside.sum()) / (outside / outside.sum()))
    n = undecided.shape[0]
    everything = sparse.vstack([x, undecided, undecided]) if n else x
    labels = np.concatenate([positive.astype(int), np.ones(n, dtype=int), np.zeros(n, dtype=int)])
    importance = np.concatenate([np.where(positive, 1.0, scale), np.full(2 * n, positive.mean())])
    importance *= len(labels) / importance.sum()
    model = LogisticRegression(C=PERSONA_C, max_iter=300).fit((everything @ sparse.diags(ratio)).tocsr(), labels, sample_weight=importance)
    return model.coef_[0] * ratio, float(model.intercept_[0])


def _temperature(logits: np.ndarray, label: np.ndarray) -> float:
    def loss(log_t: float) -> float:
        return float(-np.log(softmax(logits / np.exp(log_t))[np.arange(len(label)), label].clip(1e-12)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def _fit_in_domain(space: FeatureSpace, rows: Sequence[Labelled], request: np.ndarray, seed: int) -> tuple[np.ndarray, float, float]:
    """Calibrated weights (F,) and bias of "is a helpdesk request", and the threshold; the profile says nothing about it."""
    x = space.rows(r.text_only for r in rows)[:, : space.n_text]

    def fit(part: np.ndarray) -> tuple[np.ndarray, float]:
        model = LogisticRegression(C=IN_DOMAIN_C, max_iter=300, class_weight="balanced").fit(x[part], request[part])
        return model.coef_[0], float(model.intercept_[0])

    unseen = np.zeros(len(rows))
    for fold in _folds([r.voice for r in rows], seed):
        if len(set(request[~fold])) == 2:
            w, b = fit(~fold)
            unseen[fold] = x[fold] @ w + b
    scale = LogisticRegression(C=1e3, class_weight="balanced").fit(unseen[:, None], request)
    slope, shift = max(float(scale.coef_[0, 0]), 1e-3), float(scale.intercept_[0])
    # Where the two separate well, the threshold stays at even odds: text from outside the corpus is stranger than any of it.
    threshold = min(float(np.quantile(sigmoid(slope * unseen[request == 1] + shift), MAX_FALSE_DECLINES)), 0.5)
    w, b = fit(np.ones(len(rows), dtype=bool))
    return np.concatenate([w * slope, np.zeros(len(space) - space.n_text)]), b * slope + shift, threshold


def _term_weights(x: sparse.csr_matrix, label: np.ndarray, folds: Sequence[tuple[np.ndarray, sparse.csr_matrix]]) -> tuple[np.ndarray, float]:
    """One weight per term, (F,), and the sharpness that make the right article likeliest over all training prompts.

    x: (N, F); every fold is a mask (N,) and the articles (A, F) indexed without its voices. Words that tell who writes, not about what, lose weight.
    """
    n_terms = x.shape[1]
    parts = [(x[fold], x[fold].T.tocsr(), label[fold], vectors) for fold, vectors in folds]

    def loss(log_weights: np.ndarray) -> tuple[float, np.ndarray]:
        weights, sharp = np.exp(log_weights[:-1]), float(np.exp(log_weights[-1]))
        total, slope, sharp_slope = 0.0, np.zeros(n_terms), 0.0
        for rows, columns, right, vectors in parts:
            products = (rows @ vectors.multiply(weights).T.tocsr()).toarray()
            at = np.arange(len(right))
            p = softmax(sharp * products)
            total -= float(np.log(p[at, right].clip(1e-12)).sum())
            p[at, right] -= 1.0
            sharp_slope += float((p * products).sum()) * sharp
            slope += np.asarray(vectors.multiply((columns @ p).T).sum(axis=0)).ravel()
        pull = log_weights[:-1]
        gradient = np.append(slope * sharp * weights + 2 * TERM_PULL * pull, sharp_slope)
        return total + TERM_PULL * float(pull @ pull), gradient

    start = np.append(np.zeros(n_terms), np.log(20.0))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 40}).x
    return np.exp(found[:-1]).astype(np.float32), float(np.exp(found[-1]))


def _calibrate(start: Calibration, products: np.ndarray, label: np.ndarray, strangers: np.ndarray) -> Calibration:
    """Fit the probability that the best article is right, and the score it needs.

    products: (N, A) of prompts with an article, from an index without their voices. They serve twice: as they are, and with their own article struck
    out, as requests that no article covers. strangers: (M, A) of texts that are no requests.
    """
    struck = products.copy()
    struck[np.arange(len(label)), label] = -1.0
    right = products.argmax(axis=1) == label
    groups = [(_lead(products), right.astype(int)), (_lead(struck), np.zeros(len(label), dtype=int))]
    if len(strangers):
        groups.append((_lead(strangers), np.zeros(len(strangers), dtype=int)))
    if products.shape[1] < 2 or not right.any():
        return start
    features, target = np.concatenate([f for f, _ in groups]), np.concatenate([t for _, t in groups])
    model = LogisticRegression(C=1e3, max_iter=500).fit(features, target)
    slope, lead = (max(float(c), 0.0) for c in model.coef_[0])
    if slope + lead == 0.0:
        return start
    bias = float(model.intercept_[0])
    kept = sigmoid(bias + _lead(products[right]) @ np.array([slope, lead]))
    return replace(start, bias=bias, slope=slope, lead=lead, threshold=float(np.quantile(kept, MAX_LOST_ARTICLES)))


def _lead(products: np.ndarray) -> np.ndarray:
    """(N, A) -> (N, 2): the best product and its lead over the second."""
    two = np.sort(products, axis=1)[:, -2:]
    return np.column_stack([two[:, -1], two[:, -1] - two[:, 0]])


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
    data: RouterData, knowledge: KnowledgeBase, errors: list[dict[str, Any]]
) -> tuple[dict[str, float], list[tuple[str, str, int]]]:
    asked = [r for r in data.prompts if r.held_out]
    strangers = [r for r in data.out_of_domain if r.held_out]
    bar, scores = knowledge.calibration.threshold, knowledge.calibration.scores
    metrics: dict[str, float] = {}
    wrong: Counter[tuple[str, str]] = Counter()
    if asked:
        row_of = {a.id: i for i, a in enumerate(knowledge.articles)}
        products = np.stack([knowledge.products(r.text) for r in asked])
        label = np.array([row_of[r.topic] for r in asked])
        order = np.argsort(-products, axis=1, kind="stable")
        first = order[:, 0] == label
        best = np.array([scores(p).max() for p in products])
        struck = np.array([scores(np.delete(p, own)).max() if len(p) > 1 else 0.0 for p, own in zip(products, label, strict=True)])
        metrics |= {
            "retrieval_top1": float(first.mean()),
            "retrieval_top3": float((order[:, :3] == label[:, None]).any(axis=1).mean()),
            "article_lost": float((best[first] < bar).mean()) if first.any() else 0.0,
            "right_article_served": float((first & (best >= bar)).mean()),
            "wrong_article_served": float((~first & (best >= bar)).mean()),
            "no_article_when_struck_out": float((struck < bar).mean()),
        }
        for i in np.flatnonzero(~first):
            found = knowledge.articles[order[i, 0]].id
            wrong[asked[i].topic, found] += 1
            errors.append({"kind": "article", "text": asked[i].text, "is": asked[i].topic, "got": found, "confidence": float(best[i])})
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


def _write(out_dir: Path, classifier: PersonaClassifier, knowledge: KnowledgeBase, metrics: Mapping[str, float]) -> str:
    """Write the artefact beside `out_dir`, then rename it into place; returns the router's version."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        versions = {"classifier": classifier.save(fresh), "knowledge": knowledge.save(fresh)}
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(fresh.iterdir())}
        version = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
        about = {"version": version, "parts": versions, "personas": classifier.personas, "files": files, "metrics": dict(metrics)}
        (fresh / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        if out_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
            os.replace(out_dir, old)
            os.replace(fresh, out_dir)
            shutil.rmtree(old)
        else:
            os.replace(fresh, out_dir)
    except OSError as e:
        raise WorkError(f"{out_dir}: cannot write the router artefact: {e}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return version
