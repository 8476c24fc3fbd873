"""The router's corpus -> the article index: vectors from texts and prompts, what tells topics apart, and the calibration of scores.

An article's vector is the sum of three. One is Rocchio's: the mean of its own text and of the prompts about it, with one learnt weight per term; it
works for a company's article too, which has no prompts. The others are discriminative: a linear model per topic against all others, and one of all
topics together whose terms share a few dimensions, so that a rare word learns from its like. They err on different prompts (docs/LOG.md).
This file knows nothing of personas, MLflow or HTTP.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from tqdm import tqdm

from pipelines.router_corpus import Labelled, RouterData, folds, seen
from router.classifier import sigmoid, softmax
from router.knowledge import Calibration, KnowledgeBase, Learned, article_vectors, text_of
from router.text_space import TextSpace

# Strengths, chosen on voices left out of training: the pull of term weights towards 1, the margin models' C, what a margin counts beside a product,
# how much more a topic's own prompts weigh than all others, how much more than these the requests that no article covers (the hardest of them use a
# topic's own words), and the smoothing of their log ratios.
TERM_PULL = 1.0
MARGIN_C = 0.2
MARGIN_SHARE = 0.5
MARGIN_OWN_WEIGHT = 20
MARGIN_NONE_WEIGHT = 8
RATIO_PRIOR = 0.3
# The model of all topics together: its dimensions, what a logit counts beside a margin, the decay of its weights, how often it sees every text, or how
# many batches of how many texts where these are few, and what rows are multiplied by, whose values are small.
DIMENSIONS = 64
LOGIT_SHARE = 0.12
DECAY = 0.01
EPOCHS, MIN_BATCHES, BATCH = 6, 300, 256
GAIN = 8.0
# What calibration may cost: the share of right articles withheld from authors left out.
MAX_LOST_ARTICLES = 0.02
# Scores are calibrated on prompts of this kind where there are enough of them: the other authors hide what they mean more than people do.
PLAIN, MIN_PLAIN = "plain", 200
PHRASES_IN_A_TEXT = 6
# How many articles a company is supposed to have beside the built-in ones.
COMPANY_ARTICLES = 20


@dataclass(frozen=True)
class _Texts:
    """Rows of TF-IDF (N, F) and the article of each (N,); A stands for "no article"."""

    x: sparse.csr_matrix
    label: np.ndarray

    def part(self, mask: np.ndarray) -> _Texts:
        return _Texts(self.x[mask], self.label[mask])

    def __add__(self, other: _Texts) -> _Texts:
        return _Texts(sparse.vstack([self.x, other.x], format="csr"), np.concatenate([self.label, other.label]))


def fit_knowledge(data: RouterData, seed: int = 0) -> KnowledgeBase:
    """Index the articles with the prompts of the training voices, and calibrate on scores that a prompt got without its voice's others."""
    rows, values, articles = seen(data.prompts), data.values, data.articles
    phrases = [Labelled(text, "phrases", topic=topic) for topic, lines in data.phrases.items() for text in _grouped(lines)]
    # Not what is no request at all: that is declined before it gets here, and would blur what tells a request without an article from one with.
    outside = seen(data.uncovered)
    own_texts = [text_of(a, values) for a in articles]
    everything = [*own_texts, *(r.text for r in (*rows, *phrases, *outside))]
    space = TextSpace.fit(everything, min_grams=2, max_words=32_000, max_grams=32_000)
    row_of = {a.id: i for i, a in enumerate(articles)}
    n = len(articles)

    def texts(found: Sequence[str], label: Sequence[int]) -> _Texts:
        return _Texts(sparse.csr_matrix(space.rows(found) / np.sqrt(2.0)), np.array(label, dtype=np.int64))

    prompts = texts([r.text for r in rows], [row_of[r.topic] for r in rows])
    told = texts([*(r.text for r in phrases), *own_texts], [*(row_of[r.topic] for r in phrases), *range(n)])
    none = texts([r.text for r in outside], [n] * len(outside))

    parts = list(folds([r.voice for r in rows], seed))
    by_fold = [
        (part, article_vectors(articles, _by_topic([*(r for r, out in zip(rows, part, strict=True) if not out), *phrases]), space, values))
        for part in parts
    ]
    weights, sharpness = _term_weights(prompts.x, prompts.label, by_fold)
    products = np.zeros((len(rows), n))
    for part, vectors in by_fold:
        products[part] = (prompts.x[part] @ vectors.multiply(weights).T).toarray()

    # Requests without an article are left out by their subject: another author's words about the same thing would be no stranger to the model.
    none_parts = list(folds([r.topic or r.voice for r in outside], seed)) or [np.zeros(0, dtype=bool)] * len(parts)
    apart = [none_parts[i] if i < len(none_parts) else np.zeros(len(outside), dtype=bool) for i in range(len(parts))]
    topics = list(folds([str(t) for t in range(n)], seed))
    models = _margins(
        [
            prompts + told + none,
            *(prompts.part(~part) + told + none.part(~out) for part, out in zip(parts, apart, strict=True)),
            *(prompts.part(~out[prompts.label]) + told.part(~out[told.label]) + none for out in topics),
        ],
        n + 1,
    )
    final, by_voice, by_topic = models[0], models[1 : len(parts) + 1], models[len(parts) + 1 :]
    margins, none_margins = np.zeros((len(rows), n + 1)), np.zeros((len(outside), n + 1))
    for part, out, model in zip(parts, apart, by_voice, strict=True):
        margins[part], none_margins[out] = _apply(model, prompts.x[part]), _apply(model, none.x[out])
    usual = float(margins[:, n].mean())
    scale = np.append(np.full(n, MARGIN_SHARE), 1.0)
    learned = Learned(scale[:, None] * final[0], final[1] * scale - np.append(np.zeros(n), usual))

    # Every article's own vector: its text alone, as a company's article has them.
    own_vectors = sparse.csr_matrix(article_vectors(articles, {}, space, values).multiply(weights))
    whole = sparse.csr_matrix(article_vectors(articles, _by_topic([*rows, *phrases]), space, values).multiply(weights))
    # Where nothing was ever learnt of a prompt's topic, it stands for a request that no article covers, or only a company's article.
    struck, struck_surplus = np.full((len(rows), n), -np.inf), np.zeros(len(rows))
    for out, model in zip(topics, by_topic, strict=True):
        asked = out[prompts.label]
        found = _apply(model, prompts.x[asked])
        struck[asked], struck_surplus[asked] = (prompts.x[asked] @ whole.T).toarray() + MARGIN_SHARE * found[:, :n], found[:, n] - usual
        struck[np.ix_(asked, out)] = -np.inf
    combined = products + MARGIN_SHARE * margins[:, :n]
    gain, offset = _own_scale((prompts.x @ own_vectors.T).toarray(), struck, combined, prompts.label, topics, seed)

    start = Calibration(slope=sharpness, own_text_gain=gain, own_text_offset=offset)
    knowledge = KnowledgeBase.build(
        articles, _by_topic([*rows, *phrases]), values=values, space=space, term_weights=weights, calibration=start, learned=learned
    )
    outside_products = (none.x @ whole.T).toarray() + MARGIN_SHARE * none_margins[:, :n] if len(outside) else np.zeros((0, n))
    covered, uncovered = _plain(rows), _plain(outside)
    absent = [
        (struck[covered], struck_surplus[covered], 0.25),
        (outside_products[uncovered], none_margins[uncovered, n] - usual, 0.5),
    ]
    knowledge.calibration = _calibrate(start, combined[covered], margins[covered, n] - usual, prompts.label[covered], absent)
    return knowledge


def _plain(rows: Sequence[Labelled]) -> np.ndarray:
    """(N,) which rows to calibrate on: the plain ones, or all where these are few."""
    plain = np.array([r.kind == PLAIN for r in rows], dtype=bool)
    return plain if plain.sum() >= MIN_PLAIN else np.ones(len(rows), dtype=bool)


def _grouped(lines: Sequence[str]) -> list[str]:
    """Short phrases joined to texts about as long as a prompt; alone, a vector of length 1 would weigh each of its three words far too much."""
    return [" ; ".join(lines[i : i + PHRASES_IN_A_TEXT]) for i in range(0, len(lines), PHRASES_IN_A_TEXT)]


def _by_topic(rows: Sequence[Labelled]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        texts[row.topic].append(row.text)
    return texts


def _margins(many: Sequence[_Texts], n_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """_fit_margins of each. Processes and not threads: liblinear's random numbers are one stream per process, and results must not depend on luck."""
    jobs = -1 if len(many[0].label) > 2000 else 1
    return list(
        tqdm(Parallel(n_jobs=jobs, return_as="generator")(delayed(_fit_margins)(t, n_classes) for t in many), "topics", len(many), unit="model")
    )


def _fit_margins(texts: _Texts, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, F) and biases (C,) of what tells every class from the others; the last class is "no article"."""
    weights, biases = _fit_each(texts, n_classes)
    together, offsets = _fit_together(texts, n_classes)
    return weights.toarray() + LOGIT_SHARE * together, biases + LOGIT_SHARE * offsets


def _fit_together(texts: _Texts, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, F) and biases (C,) of one linear model of all classes through DIMENSIONS hidden units; its logits have a mean of 0 over the classes.

    A class without texts gets the mean, so neither weight nor bias.
    """
    batches = max(1, math.ceil(len(texts.label) / BATCH))
    epochs = max(EPOCHS, math.ceil(MIN_BATCHES / batches))
    model = MLPClassifier((DIMENSIONS,), activation="identity", alpha=DECAY, batch_size=min(BATCH, len(texts.label)), max_iter=epochs, random_state=0)
    weights, biases = np.zeros((n_classes, texts.x.shape[1]), dtype=np.float32), np.zeros(n_classes)
    if len(set(texts.label.tolist())) < 3:
        return weights, biases  # of two classes there is but one logit, and nothing that the others do not say
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(texts.x * GAIN, texts.label)
    (inner, outer), (inner_bias, outer_bias) = model.coefs_, model.intercepts_
    outer, outer_bias = outer - outer.mean(axis=1, keepdims=True), outer_bias - outer_bias.mean()
    weights[model.classes_] = (GAIN * inner @ outer).T
    biases[model.classes_] = inner_bias @ outer + outer_bias
    return weights, biases


def _fit_each(texts: _Texts, n_classes: int) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Weights (C, F) and biases (C,) of one linear support vector machine per class against all others; the last class is "no article".

    Every feature is first multiplied by the logarithm of how much more often it occurs in the class than elsewhere (Wang and Manning 2012, "Baselines
    and bigrams"). A class without texts gets no weights and a bias of -1.
    """
    present = texts.x.astype(bool).astype(np.float64)
    classes = sparse.csr_matrix((np.ones(len(texts.label)), (texts.label, np.arange(len(texts.label)))), shape=(n_classes, len(texts.label)))
    inside = np.asarray((classes @ present).todense())
    overall = inside.sum(axis=0)
    weights, biases = [], np.full(n_classes, -1.0)
    for c in range(n_classes):
        mine = texts.label == c
        if not mine.any() or mine.all():
            weights.append(sparse.csr_matrix((1, texts.x.shape[1]), dtype=np.float32))
            continue
        others = overall - inside[c]
        here, there = inside[c] + RATIO_PRIOR, others * (inside[c].sum() / others.sum()) + RATIO_PRIOR
        ratio = np.log((here / here.sum()) / (there / there.sum()))
        own = MARGIN_OWN_WEIGHT if mine.mean() < 0.05 else 1.0
        weight = np.where((texts.label == n_classes - 1) & ~mine, MARGIN_NONE_WEIGHT, 1.0)
        model = LinearSVC(C=MARGIN_C, class_weight={True: own, False: 1.0}, max_iter=60, tol=0.05, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(texts.x.multiply(ratio).tocsr(), mine, sample_weight=weight)
        weights.append(sparse.csr_matrix((model.coef_ * ratio).astype(np.float32)))
        biases[c] = model.intercept_[0]
    return sparse.vstack(weights, format="csr"), biases


def _apply(model: tuple[np.ndarray, np.ndarray], x: sparse.csr_matrix) -> np.ndarray:
    """Margins (N, C) of rows (N, F)."""
    out: np.ndarray = x @ model[0].T + model[1]
    return out


def _own_scale(
    own: np.ndarray, struck: np.ndarray, combined: np.ndarray, label: np.ndarray, topics: Sequence[np.ndarray], seed: int
) -> tuple[float, float]:
    """What the product with an article that has no prompts is multiplied by and what is added, so that it can be held against the others'.

    own: (N, A) products of prompts with each article's text alone; struck: (N, A) what a prompt's rivals score where they and its topic were never
    learnt apart, -inf for the topics left out with it; combined: (N, A) what prompts score; topics: masks (A,) of those left out together. Twenty
    company articles at a time are supposed beside the built-in ones: theirs are the prompts about them, and no others. Where these cannot be told apart, the
    products' medians are made equal.
    """
    at = np.arange(len(label))
    alike = float(np.median(combined[at, label]) / max(float(np.median(own[at, label])), 1e-9)), 0.0
    random = np.random.default_rng(seed)
    rows, target = [], []
    for out in topics:
        company = random.permutation(np.flatnonzero(out))[:COMPANY_ARTICLES]
        theirs = np.isin(label, company)
        rivals = np.where(theirs[:, None], struck, combined)
        rivals[:, company] = -np.inf
        rows.append(np.column_stack([own[:, company].max(axis=1), rivals.max(axis=1)]))
        target.append(theirs)
    pairs, wins = np.concatenate(rows), np.concatenate(target)
    known = np.isfinite(pairs).all(axis=1)
    if len(set(wins[known].tolist())) < 2:
        return alike
    model = LogisticRegression(C=1e3, class_weight="balanced").fit(pairs[known], wins[known])
    (mine, other), bias = model.coef_[0], float(model.intercept_[0])
    return (float(mine / -other), bias / float(-other)) if mine > 0 > other else alike


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


def _calibrate(
    start: Calibration,
    products: np.ndarray,
    surplus: np.ndarray,
    label: np.ndarray,
    absent: Sequence[tuple[np.ndarray, np.ndarray, float]],
) -> Calibration:
    """Fit the probability that the best article is right, and the score it needs.

    products: (N, A) and surplus: (N,) of prompts with an article, from models without their voices. absent: the same of requests that no article
    covers, each group with its weight against all the covered ones.
    """
    right = products.argmax(axis=1) == label
    if products.shape[1] < 2 or not right.any():
        return start
    groups = [(_lead(products, surplus), right.astype(int), 1.0)]
    groups += [(_lead(p, s), np.zeros(len(p), dtype=int), w) for p, s, w in absent if len(p)]
    features = np.concatenate([f for f, _, _ in groups])
    target = np.concatenate([t for _, t, _ in groups])
    if len(set(target)) < 2:
        return start
    weight = np.concatenate([np.full(len(t), w * len(label) / len(t)) for _, t, w in groups])
    model = LogisticRegression(C=1e3, max_iter=500).fit(features, target, sample_weight=weight)
    slope, lead, none = (max(float(c), 0.0) for c in model.coef_[0] * [1, 1, -1])
    if slope + lead == 0.0:
        return start
    bias = float(model.intercept_[0])
    kept = sigmoid(bias + _lead(products[right], surplus[right]) @ np.array([slope, lead, -none]))
    return replace(start, bias=bias, slope=slope, lead=lead, none=none, threshold=float(np.quantile(kept, MAX_LOST_ARTICLES)))


def _lead(products: np.ndarray, surplus: np.ndarray) -> np.ndarray:
    """(N, A) and (N,) -> (N, 3): the best product, its lead over the second, the surplus. -inf, where an article is left out, is no rival."""
    two = np.sort(products, axis=1)[:, -2:]
    lead = np.where(np.isfinite(two[:, 0]), two[:, -1] - two[:, 0], 0.0)
    return np.column_stack([np.where(np.isfinite(two[:, -1]), two[:, -1], 0.0), lead, surplus])
