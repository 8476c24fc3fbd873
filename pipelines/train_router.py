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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from scipy import sparse
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from persona_models.encoder import SentenceEncoder
from persona_models.errors import ConfigError, WorkError
from pipelines.router_corpus import FOLDS, Labelled, RouterData, Titles, folds, read_router_corpus, seen
from pipelines.router_report import RouterReport, measure
from pipelines.train_follow_ups import fit_follow_ups
from pipelines.train_knowledge import fit_knowledge
from pipelines.train_matters import fit_matters
from pipelines.train_segments import fit_segmenter, fit_trust
from router.artefact import MANIFEST
from router.classifier import PersonaClassifier, Tells, sigmoid, softmax
from router.features import FeatureSpace
from router.follow_up import FollowUps
from router.knowledge import KnowledgeBase
from router.lexicon import Lexicon
from router.matters import Matters
from router.query import Profile
from router.segment import Segmenter
from router.text_space import TextSpace

# Strength of the fits (scikit-learn's C) and of the pull of term weights towards 1; chosen on voices left out of training.
PERSONA_C = 5.0
IN_DOMAIN_C = 30.0
TELLS_C = 1.0
PROFILE_WEIGHT = 2.0
PROFILES_PER_TITLE = 2
# What calibration may cost: the share of real requests declined, and of right articles withheld.
MAX_FALSE_DECLINES = 0.01
EVEN_ODDS = 0.5


def train_router(
    corpus_dir: Path,
    out_dir: Path,
    personas: Sequence[str],
    seed: int = 0,
    *,
    prompts: Sequence[Labelled] = (),
    own_personas: Sequence[str] = (),
    encoder: SentenceEncoder | None = None,
    rival: Path | None = None,
) -> RouterReport:
    """Train, measure on the held-out voices, and put the artefact in place of what `out_dir` held.

    prompts: labelled ones of a company; own_personas: those that the corpus is of, where they are others than `personas`: the prompts alone then tell
    the labels apart, while the corpus still says what is a request and which article it needs; encoder: its vectors are features of a text as well;
    rival: the artefact of another router, to be measured on the same held-out voices.

    The new folder appears whole or not at all; its manifest.json lists the digest of every file. Raises WorkError for a corpus that cannot be
    trained on.
    """
    data = read_router_corpus(corpus_dir, own_personas or personas)
    knowledge = fit_knowledge(data, seed)
    about = _with_prompts(data, prompts, same=not own_personas) if prompts else data
    classifier = fit_classifier(about, personas, seed, encoder)
    report = measure(about, classifier, knowledge, data.prompts)
    other = _measure_rival(rival, about, data.prompts, personas, encoder) if rival else None
    follow_ups, figures = fit_follow_ups(data.follow_ups, [r.text for r in seen((*data.prompts, *data.uncovered))], seed)
    matters, split = fit_matters(knowledge, Segmenter.from_facts(classifier.segments), data, seed)
    report = replace(report, metrics={**report.metrics, **figures, **split})
    version = _write(out_dir, classifier, knowledge, (follow_ups, matters), report.metrics)
    return replace(report, version=version, rival=other)


def _measure_rival(
    folder: Path, data: RouterData, asked: Sequence[Labelled], personas: Sequence[str], encoder: SentenceEncoder | None
) -> dict[str, float] | None:
    """The metrics of a router that was trained before; None where it is of other personas, another encoder or another format: no rival."""
    try:
        classifier = PersonaClassifier.load(folder, personas, encoder.name if encoder else None)
        knowledge = KnowledgeBase.load(folder)
    except ConfigError:
        return None
    return measure(data, classifier, knowledge, asked).metrics


def _with_prompts(data: RouterData, prompts: Sequence[Labelled], *, same: bool) -> RouterData:
    """The corpus with a company's prompts: beside its own where they are of the same personas, else instead of all that is of personas."""
    if same:
        return replace(data, personal=(*data.personal, *prompts))
    # Its requests still are requests, whoever they are from.
    odd = tuple(replace(r, persona="", topic="") for r in (*data.prompts, *data.personal, *data.neutral, *data.odd))
    return replace(data, prompts=(), personal=tuple(prompts), neutral=(), odd=odd, titles=Titles(), lexicon={}, talks=(), requests=())


def fit_classifier(data: RouterData, personas: Sequence[str], seed: int = 0, encoder: SentenceEncoder | None = None) -> PersonaClassifier:
    """Fit the persona model and the in-domain model, calibrate both on scores of voices left out. Raises WorkError for a persona without prompts."""
    everyone = seen((*data.prompts, *data.personal))
    rows = [*(r for r in everyone if r.tells), *_profiles(data.titles, seed)]
    queries = [r.query for r in rows]
    missing = set(personas) - {r.persona for r in rows}
    if missing:
        raise WorkError(f"the corpus has no training prompts for {', '.join(sorted(missing))}; add some under prompts/ or router/persona.jsonl")
    neutral = seen(data.neutral)
    strangers = seen(data.out_of_domain)
    odd = seen(data.odd)
    uncovered = seen(data.uncovered)
    everybody = list(dict.fromkeys(r.text for r in (*everyone, *neutral, *uncovered, *odd, *strangers)))
    if encoder:
        encoder.prepare(everybody)
    space = FeatureSpace.fit(queries, TextSpace.fit(everybody), profile_weight=PROFILE_WEIGHT, lexicon=Lexicon(data.lexicon), encoder=encoder)
    label = np.array([list(personas).index(r.persona) for r in rows])
    # What came with a profile says nothing by itself ("is the wifi down?"): without it, it is one more neutral text. Taught with its sender's
    # persona instead, it only adds noise: 0.19 of such texts from unseen authors were right, no better than chance.
    silent = [*neutral, *(r for r in rows if r.profile and r.text)]
    n_undecided = len(silent)
    silent += [r for r in everyone if not r.tells and not r.profile]
    x, quiet_x = space.rows(queries), space.rows(r.text_only for r in silent)
    weights, bias = _fit_personas(x, label, quiet_x[:n_undecided], len(personas), space.dense)
    speaks = np.array([bool(r.text) and not r.profile for r in rows])
    said = sparse.vstack([x[speaks], quiet_x]).tocsr()
    tells = np.array([1] * int(speaks.sum()) + [0] * len(silent))

    # What each text gets from models that have not seen its author.
    unseen, unseen_silent = np.zeros((len(rows), len(personas))), np.zeros((len(silent), len(personas)))
    unseen_tells = np.zeros(len(tells))
    voices = [r.voice for r in (*rows, *silent)]
    parts = list(folds(voices, seed))
    apart: list[tuple[set[str], np.ndarray, np.ndarray, LogisticRegression | None]] = []
    for part in tqdm(parts, desc="personas, on voices left out", unit="part", dynamic_ncols=True):
        mine, quiet = part[: len(rows)], part[len(rows) :]
        both = np.concatenate([mine[speaks], quiet])
        w, b = _fit_personas(x[~mine], label[~mine], quiet_x[:n_undecided][~quiet[:n_undecided]], len(personas), space.dense)
        unseen[mine], unseen_silent[quiet] = x[mine] @ w + b, quiet_x[quiet] @ w + b
        model = _fit_tells(said[~both], tells[~both]) if len(set(tells[~both])) == 2 else None
        if model:
            unseen_tells[both] = model.decision_function(said[both])
        apart.append(({voices[i] for i in np.flatnonzero(part)}, w, b, model))
    temperature = _temperature(unseen, label)
    leading = softmax(np.vstack([unseen[speaks], unseen_silent]) / temperature).max(axis=1)
    # Texts were marked as silent where a router was of another mind than their author: of what a router makes of them, they say nothing.
    fair = np.arange(len(tells)) < int(speaks.sum()) + n_undecided
    known = _calibrate_tells(leading[fair], unseen_tells[fair], tells[fair], _fit_tells(said, tells)) if len(set(tells[fair])) == 2 else None

    inside, inside_bias, threshold = np.zeros(len(space)), 10.0, 0.0
    if strangers and len({r.voice for r in strangers}) > 1:
        inside, inside_bias, threshold = _fit_in_domain(space, [*everyone, *neutral, *uncovered], odd, strangers, seed)
    made = PersonaClassifier(space, personas, np.column_stack([weights, inside]), np.append(bias, inside_bias), temperature, threshold, tells=known)
    made.trust = fit_trust(made, data.talks)
    unseen_by: dict[str, PersonaClassifier] = {}
    for left_out, w, b, model in apart:
        own = replace(known, weights=model.coef_[0].astype(np.float32), bias=float(model.intercept_[0])) if known and model else known
        other = PersonaClassifier(space, personas, np.column_stack([w, inside]), np.append(b, inside_bias), temperature, threshold, tells=own)
        unseen_by |= dict.fromkeys(left_out, other)
    segmenter = fit_segmenter(made, data, seed, unseen_by)
    made.segments = segmenter.facts() if segmenter else None
    return made


def _profiles(titles: Titles, seed: int) -> list[Labelled]:
    """Profiles composed of titles, departments and times with the company, without a text: whoever asks may ask anything."""
    random = Random(seed)
    rows: list[Labelled] = []
    everywhere = [d for found in titles.departments.values() for d in found]

    def add(persona: str, title: str, department: str) -> None:
        new = titles.first_days > 0 and random.random() < 0.2
        settled = random.randint(titles.first_days, max(400, titles.first_days)), max(titles.first_days, random.randint(400, 6000))
        days = random.randint(0, titles.first_days - 1) if new else random.choice([None, *settled])
        if persona == titles.newcomers:
            days = random.choice([None, random.randint(0, 60), random.randint(0, 300)])
        of = titles.newcomers if new and persona not in (*titles.lasting, titles.newcomers) else persona
        rows.append(Labelled("", f"titles_{len(rows) % FOLDS}", of, profile=Profile(title, department, days)))

    for persona, names in titles.titles.items():
        departments = titles.departments.get(persona) or everywhere
        for name in names:
            for _ in range(PROFILES_PER_TITLE):
                add(persona, name, random.choice(["", random.choice(departments)]) if departments else "")
    for persona, names in titles.departments.items():
        for name in names:
            add(persona, "", name)
    return rows


def _fit_personas(
    x: sparse.csr_matrix, label: np.ndarray, neutral: sparse.csr_matrix, n_personas: int, dense: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, P) and bias (P,): one model per persona against the others; dense: columns that every text has a value in.

    A neutral text stands on either side of each, which teaches the models to stay undecided about it.
    """
    weights, bias = np.zeros((x.shape[1], n_personas)), np.full(n_personas, -5.0)
    for persona in range(n_personas):
        mine = label == persona
        # A fold may lack a persona altogether; it then stays unlikely.
        if mine.any() and not mine.all():
            weights[:, persona], bias[persona] = _fit_one(x, mine, neutral, dense)
    return weights, bias


def _fit_one(x: sparse.csr_matrix, positive: np.ndarray, undecided: sparse.csr_matrix, dense: slice) -> tuple[np.ndarray, float]:
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
    ratio[dense] = 1.0
    n = undecided.shape[0]
    everything = sparse.vstack([x, undecided, undecided]) if n else x
    labels = np.concatenate([positive.astype(int), np.ones(n, dtype=int), np.zeros(n, dtype=int)])
    importance = np.concatenate([np.where(positive, 1.0, scale), np.full(2 * n, positive.mean())])
    importance *= len(labels) / importance.sum()
    model = LogisticRegression(C=PERSONA_C, max_iter=300).fit((everything @ sparse.diags(ratio)).tocsr(), labels, sample_weight=importance)
    return model.coef_[0] * ratio, float(model.intercept_[0])


def _fit_tells(x: sparse.csr_matrix, tells: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=TELLS_C, max_iter=300, class_weight="balanced").fit(x, tells)


def _calibrate_tells(leading: np.ndarray, score: np.ndarray, tells: np.ndarray, model: LogisticRegression) -> Tells:
    """How a model of whether a text tells goes together with the leading persona's probability.

    leading, score: as unseen models gave them. Both kinds of text count alike, and the threshold stands at even odds: guessing who somebody is costs as
    much as not recognising somebody.
    """
    p = np.clip(leading, 1e-6, 1 - 1e-6)
    joint = LogisticRegression(class_weight="balanced").fit(np.column_stack([np.log(p / (1 - p)), score]), tells)
    lead, own = (float(v) for v in joint.coef_[0])
    return Tells(model.coef_[0].astype(np.float32), float(model.intercept_[0]), lead, own, float(joint.intercept_[0]), EVEN_ODDS)


def _temperature(logits: np.ndarray, label: np.ndarray) -> float:
    def loss(log_t: float) -> float:
        return float(-np.log(softmax(logits / np.exp(log_t))[np.arange(len(label)), label].clip(1e-12)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def _fit_in_domain(
    space: FeatureSpace, requests: Sequence[Labelled], odd: Sequence[Labelled], strangers: Sequence[Labelled], seed: int
) -> tuple[np.ndarray, float, float]:
    """Calibrated weights (F,) and bias of "is a helpdesk request", and the threshold; the profile says nothing about it.

    odd: requests that were collected for looking like none; they teach, but how many of them are declined says nothing of usual ones.
    """
    rows = [*requests, *odd, *strangers]
    request = np.array([1] * (len(requests) + len(odd)) + [0] * len(strangers))
    x = space.rows(r.text_only for r in rows)[:, : space.n_text]

    def fit(part: np.ndarray) -> tuple[np.ndarray, float]:
        model = LogisticRegression(C=IN_DOMAIN_C, max_iter=300, class_weight="balanced").fit(x[part], request[part])
        return model.coef_[0], float(model.intercept_[0])

    unseen = np.zeros(len(rows))
    for fold in folds([r.voice for r in rows], seed):
        if len(set(request[~fold])) == 2:
            w, b = fit(~fold)
            unseen[fold] = x[fold] @ w + b
    scale = LogisticRegression(C=1e3, class_weight="balanced").fit(unseen[:, None], request)
    slope, shift = max(float(scale.coef_[0, 0]), 1e-3), float(scale.intercept_[0])
    # Where the two separate well, the threshold stays at even odds: text from outside the corpus is stranger than any of it.
    threshold = min(float(np.quantile(sigmoid(slope * unseen[: len(requests)] + shift), MAX_FALSE_DECLINES)), 0.5)
    w, b = fit(np.ones(len(rows), dtype=bool))
    return np.concatenate([w * slope, np.zeros(len(space) - space.n_text)]), b * slope + shift, threshold


def _write(
    out_dir: Path, classifier: PersonaClassifier, knowledge: KnowledgeBase, others: Sequence[FollowUps | Matters | None], metrics: Mapping[str, float]
) -> str:
    """Write the artefact beside `out_dir`, then rename it into place; returns the router's version."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        versions = {"classifier": classifier.save(fresh), "knowledge": knowledge.save(fresh)}
        for part in others:
            if part:
                part.save(fresh)
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
