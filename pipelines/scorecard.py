"""`deskroute evaluate`: the unseen prompts of corpus/evaluation, sent the way a request goes, and what came of them.

The prompts were written by people who wrote none of the training text. Nothing here is used for training or for choosing thresholds.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from persona_models.errors import WorkError
from persona_models.protocol import BASE
from pipelines.compose import CORPUS
from pipelines.evaluate import facts, repeats
from pipelines.local import local_desk
from pipelines.routing_card import routing_figures, share
from pipelines.tracking import PERSONA_EXPERIMENT, Tracker
from router.config import Config
from router.desk import Desk
from router.knowledge import load_folder
from router.schema import ChatRequest

EVALUATION = CORPUS / "evaluation"


@dataclass
class Scorecard:
    """Figures by name (shares in 0..1 unless the name says otherwise), and the rows behind them."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    grounding: list[dict[str, Any]] = field(default_factory=list)
    misses: list[dict[str, Any]] = field(default_factory=list)
    matrix: tuple[list[str], Any] | None = None


def evaluate(config: Config) -> Scorecard:
    """Measure the models in force and log the scorecard to MLflow."""
    desk = local_desk(config, models=True)
    card = Scorecard()
    try:
        card.metrics, card.misses = routing_figures(desk, read)
        _retrieval(desk, card)
        asyncio.run(_answers(desk, card))
    finally:
        asyncio.run(_close(desk))
    from pipelines.retrain import Retraining

    work = Retraining(config)
    adapters = {p: folder for p in desk.personas if (folder := work.folder_in_force(p))}
    if adapters:
        matrix = work.matrix(adapters)
        card.matrix = (list(adapters), matrix)
        for i, persona in enumerate(adapters):
            card.metrics[f"{persona}_loss_against_base"] = float(matrix[i, i + 1] / matrix[i, 0])
            card.metrics[f"{persona}_own_is_lowest"] = float(matrix[i].argmin() == i + 1)
    tracker = Tracker(config.registry_uri, config.state / "artifacts")
    tags = {"stage": "scorecard"}
    with tracker.run(PERSONA_EXPERIMENT, "scorecard", tags=tags, params={"base": config.base}, description="The unseen evaluation set.") as run:
        run.metrics({f"unseen/{k}": v for k, v in card.metrics.items()})
        for name, rows in (("answers", card.answers), ("grounding", card.grounding), ("misses", card.misses)):
            if rows:
                run.table({k: [str(r.get(k, "")) for r in rows] for k in rows[0]}, f"unseen_{name}.json")
    return card


def read(name: str) -> list[dict[str, Any]]:
    """The rows of an evaluation file."""
    path = EVALUATION / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as e:
        raise WorkError(f"{path}: cannot be read ({e}); restore pipelines/corpus/evaluation") from None


def _request(row: Mapping[str, Any], model: str = "auto", max_tokens: int | None = None) -> ChatRequest:
    return ChatRequest.model_validate({"model": model, "messages": [{"role": "user", "content": row["text"]}], "max_tokens": max_tokens})


def _retrieval(desk: Desk, card: Scorecard) -> None:
    """The first round's writers hide what they mean more than people do; the plain ones write as people do, the short ones in a few words."""
    for prefix in ("", "plain_", "short_"):
        rows = read(f"{prefix}retrieval")
        found = [desk.knowledge.match(r["text"], 3) for r in rows]
        top = [[m.article.id for m in matches] for matches in found]
        card.metrics[f"{prefix}retrieval_top1"] = share(t[:1] == [r["topic"]] for t, r in zip(top, rows, strict=True))
        card.metrics[f"{prefix}retrieval_top3"] = share(r["topic"] in t for t, r in zip(top, rows, strict=True))
        card.metrics[f"{prefix}covered_without_article"] = share(desk.knowledge.best(r["text"]) is None for r in rows)
        card.metrics[f"{prefix}uncovered_without_article"] = share(desk.knowledge.best(r["text"]) is None for r in read(f"{prefix}uncovered"))
        card.misses += [
            {"kind": f"{prefix}retrieval", "text": r["text"], "want": r["topic"], "got": t[0] if t else ""}
            for t, r in zip(top, rows, strict=True)
            if t[:1] != [r["topic"]]
        ]


async def _answers(desk: Desk, card: Scorecard) -> None:
    rows = read("answers")
    for model in ("persona", BASE):
        said = await _ask(desk, rows, model)
        prefix = "" if model == "persona" else "base_"
        named = [[any(a in s["answer"].lower() for a in action) for action in r["actions"]] for s, r in zip(said, rows, strict=True)]
        card.metrics[f"{prefix}actions_named"] = share(n for row in named for n in row)
        card.metrics[f"{prefix}answers_with_all_actions"] = share(all(row) for row in named)
        right = [(s, n) for s, n, r in zip(said, named, rows, strict=True) if s["article"] == r["topic"]]
        card.metrics[f"{prefix}actions_named_right_article"] = share(x for _, n in right for x in n)
        card.metrics[f"{prefix}ends"] = share(s["finish"] == "stop" for s in said)
        documents = [s.pop("document") for s in said]
        card.metrics[f"{prefix}repeats"] = share(repeats(s["answer"], d) for s, d in zip(said, documents, strict=True))
        if model == "persona":
            card.metrics["right_article"] = share(s["article"] == r["topic"] for s, r in zip(said, rows, strict=True))
            for r, s, row in zip(rows, said, named, strict=True):
                missing = [a for a, n in zip(r["actions"], row, strict=True) if not n]
                card.answers.append({"prompt": r["text"], "persona": r["persona"], "topic": r["topic"], **s, "missing": missing})
    await _ground(desk, card)


async def _ground(desk: Desk, card: Scorecard) -> None:
    """Articles that no model saw, put beside the built-in ones as a company would."""
    own = load_folder(EVALUATION / "grounding", desk.personas)
    by_id = {a.id: a for a in own}
    before, desk.knowledge = desk.knowledge, desk.knowledge.with_articles(own)
    try:
        rows = read("grounding")
        said = await _ask(desk, rows, "persona")
    finally:
        desk.knowledge = before
    card.metrics["grounding_right_article"] = share(s["article"] == r["topic"] for s, r in zip(said, rows, strict=True))
    carried: Counter[str] = Counter()
    for s, r in zip(said, rows, strict=True):
        if s["article"] != r["topic"]:
            continue
        article = by_id[r["topic"]]
        document = s["document"]
        steps = article.steps_for(r["persona"])
        shown = [st for st in document.splitlines() if st[:1].isdigit()][: {"leadership": 3, "field": 4}.get(r["persona"], len(steps))]
        need = set().union(*(facts(line.split(". ", 1)[1]) for line in shown)) if shown else set()
        stated = facts(s["answer"])
        known = f"{document} {r['text']}".lower()
        carried.update(need=len(need), has=sum(f in s["answer"].lower() for f in need), stated=len(stated), known=sum(f in known for f in stated))
        card.grounding.append(
            {
                "prompt": r["text"],
                "persona": r["persona"],
                "topic": r["topic"],
                "answer": s["answer"],
                "invented": [f for f in stated if f not in known],
            }
        )
    card.metrics["grounding_carried"] = carried["has"] / max(1, carried["need"])
    card.metrics["grounding_not_invented"] = carried["known"] / max(1, carried["stated"])


async def _ask(desk: Desk, rows: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, str]]:
    """Answers to the rows, each by its own persona (or the base), through the whole way of a request."""
    results = []
    for row in tqdm(rows, desc=f"answers, {model}", unit="answer"):
        request = _request(row, row["persona"] if model == "persona" else model)
        plan = await desk.begin(request)
        events = [e async for e in desk.answer(request, plan)]
        article = plan.block.sources[0].id if plan.block.sources else ""
        said = "".join(e.text for e in events)
        results.append({"answer": said, "finish": str(events[-1].finish_reason), "article": article, "document": plan.parts[0].document})
    return results


async def _close(desk: Desk) -> None:
    for engine in set(desk.engines.values()):
        await engine.close()


def print_card(card: Scorecard, path: Path | None) -> None:
    """The figures as a table; with a path also as JSON."""
    for name, value in card.metrics.items():
        print(f"  {name:<32}{value:>8.3f}")
    if path:
        path.write_text(
            json.dumps(
                {"metrics": card.metrics, "answers": card.answers, "grounding": card.grounding, "misses": card.misses}, indent=1, ensure_ascii=False
            )
            + "\n"
        )
