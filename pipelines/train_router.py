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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import LogisticRegression

from persona_models.errors import WorkError
from pipelines.router_corpus import Labelled, RouterData, read_router_corpus
from pipelines.router_report import RouterReport, measure
from router.classifier import MANIFEST, PersonaClassifier, sigmoid, softmax
from router.features import FeatureSpace, TextSpace
from router.knowledge import Calibration, KnowledgeBase, article_vectors, text_of

FOLDS = 8
# Strength of the fits (scikit-learn's C) and of the pull of term weights towards 1; chosen on voices left out of training.
PERSONA_C = 3.0
IN_DOMAIN_C = 30.0
PROFILE_WEIGHT = 2.0
TERM_PULL = 1.0
# What calibration may cost: the share of real requests declined, and of right articles withheld.
MAX_FALSE_DECLINES = 0.01
MAX_LOST_ARTICLES = 0.01
PHRASES_IN_A_TEXT = 6


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
