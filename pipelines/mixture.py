"""`deskroute bench mixture`: whether a mixture of two personas answers better than the likelier one alone, and how close the two must be for it.

Held-out requests are routed by their text. The loss of the answer that their own persona would have given says how far off each way of answering is:
the leading persona's adapter alone (what a router without mixtures does), the two leading ones by their shares, and, to see what there is to gain, the
right persona's and the base. The article in the prompt is the one that the right persona gets, for all ways. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from persona_models.adapters import read_adapter
from persona_models.base_model import BaseModel
from persona_models.errors import InputError, WorkError
from persona_models.gated_lora import LoraBank
from pipelines import plots
from pipelines.compose import CORPUS, Corpus
from pipelines.dataset import Sample, corpus_samples
from pipelines.finetune import encode_sample
from pipelines.retrain import Retraining
from pipelines.tracking import ROUTER_EXPERIMENT, Tracker
from pipelines.training import losses_by_example
from router.loading import load_classifier
from router.policy import shares
from router.query import Query

SAMPLES_PER_PERSONA = 100
# How far the leading persona is ahead of the second, as a difference of probabilities; the last group is every decision a router is sure of.
MARGINS = (0.0, 0.12, 0.25, 0.5, 0.75, 1.0)
SHARPNESS = (0.5, 1.0, 2.0)
LEADING, RIGHT, BASE = "leading alone", "right one", "base"
RESAMPLES = 2000


def study(config: Any) -> list[dict[str, Any]]:
    """One row per margin: mean losses in nats a token, and the mixture's difference to the leading persona with the 95 % interval of a paired bootstrap.

    The rows, a picture and the losses of every request are logged to MLflow.
    """
    personas = {p.id: p for p in config.catalogue()}
    if len(personas) < 2:
        raise InputError(f"bench mixture: a mixture takes two personas, the catalogue has {len(personas)}")
    seed = config.training.seed
    corpus = Corpus(config.corpus or CORPUS, tuple(personas))
    asked = [(p, s) for p in personas for s in corpus_samples(corpus, p, SAMPLES_PER_PERSONA, seed=seed, held_out=True)]
    scores, _ = load_classifier(config).probabilities([Query(_text(s)) for _, s in asked])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    two = np.take_along_axis(scores, order, axis=1)
    names = list(personas)
    work = Retraining(config)
    base = work.base
    bank = LoraBank(base.model)
    for p in names:
        if folder := work.folder_in_force(p):
            adapter = read_adapter(folder, base)
            bank.load(p, adapter.rank, adapter.factors)
    found: list[dict[str, float]] = []
    kept: list[int] = []
    try:
        for i, (right, sample) in enumerate(tqdm(asked, desc="answers", unit="answer", dynamic_ncols=True)):
            leading, second = (names[p] for p in order[i])
            gates = {LEADING: {leading: 1.0}, RIGHT: {right: 1.0}, BASE: {}}
            gates |= {_name(s): shares({leading: two[i, 0], second: two[i, 1]}, s) for s in SHARPNESS}
            losses = {}
            for way, gate in gates.items():
                manner = personas[right if way == RIGHT else leading].manner
                known = {p: w for p, w in gate.items() if p in bank.slots}
                losses[way] = _loss(base, bank, sample, manner, known, config.training.max_tokens)
            # What a base's context cannot hold has no loss.
            if None not in losses.values():
                found.append({way: float(loss or 0.0) for way, loss in losses.items()})
                kept.append(i)
    finally:
        bank.uninstall()
    if not found:
        raise WorkError(f"none of {len(asked)} requests fits into the {base.context_tokens} tokens of {config.base} with its article")
    right_one, leading_one = [asked[i][0] for i in kept], [names[order[i, 0]] for i in kept]
    margin = (two[:, 0] - two[:, 1])[kept]
    table = {way: np.array([losses[way] for losses in found]) for way in found[0]}
    rows = summary(margin, np.array([r == p for r, p in zip(right_one, leading_one, strict=True)]), table, seed)
    _log(config, rows, {"persona": right_one, "leading": leading_one, "margin": margin.round(4).tolist()}, table)
    return rows


def summary(margin: np.ndarray, hit: np.ndarray, losses: Mapping[str, np.ndarray], seed: int = 0) -> list[dict[str, Any]]:
    """margin, hit (whether the leading persona is the right one) and every way's losses are of the same N requests. A margin without requests is left out."""
    random = np.random.default_rng(seed)
    rows = []
    for low, high in pairwise(MARGINS):
        of = np.flatnonzero((margin >= low) & ((margin < high) | (high == MARGINS[-1])))
        if not len(of):
            continue
        change = losses[_name(1.0)][of] - losses[LEADING][of]
        drawn = change[random.integers(0, len(of), (RESAMPLES, len(of)))].mean(axis=1)
        rows.append(
            {"margin": f"{low:g} to {high:g}", "requests": len(of), "leading is right": round(float(hit[of].mean()), 3)}
            | {way: round(float(found[of].mean()), 4) for way, found in losses.items()}
            | {
                "change": round(float(change.mean()), 4),
                "from": round(float(np.quantile(drawn, 0.025)), 4),
                "to": round(float(np.quantile(drawn, 0.975)), 4),
                "mixture is better": round(float((change < 0).mean()), 3),
            }
        )
    return rows


def _name(sharpness: float) -> str:
    return "mixture" if sharpness == 1.0 else f"mixture, sharpness {sharpness:g}"


def _text(sample: Sample) -> str:
    return next(m.content for m in reversed(sample.messages) if m.role == "user")


def _loss(base: BaseModel, bank: LoraBank, sample: Sample, manner: str, gate: Mapping[str, float], longest: int) -> float | None:
    """Nats per answer token; None where the sample is too long."""
    example = encode_sample(base, sample, manner)
    if len(example[0]) > min(longest, base.context_tokens):
        return None
    bank.gate.rows = bank.open([gate])
    sums, counts = losses_by_example(base.model, [example], base.tokenizer.pad_token_id)
    return sums[0] / max(1, counts[0])


def _log(config: Any, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Sequence[Any]], losses: Mapping[str, np.ndarray]) -> None:
    tracker = Tracker(config.registry_uri, config.state / "artifacts")
    settings = {"base": config.base, "mix_margin": config.policy.mix_margin, "mix_sharpness": config.policy.mix_sharpness}
    with tracker.run(
        ROUTER_EXPERIMENT, "mixture-study", tags={"stage": "study"}, params=settings, description="Mixtures of two personas against the likelier one."
    ) as run:
        run.metrics({f"study/change_{row['margin'].replace(' to ', '_')}": row["change"] for row in rows})
        run.table({k: [row[k] for row in rows] for k in rows[0]}, "mixture.json")
        run.table(dict(about) | {way: found.round(4).tolist() for way, found in losses.items()}, "mixture_requests.json")
        run.figure(plots.mixture(rows), "plots/mixture.png")
