"""The request's way without a server: `deskroute ask` and `deskroute route` run router and engine in this process."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from persona_models.deployment import PersonaPool, replica_threads
from persona_models.errors import DeskrouteError, InputError
from persona_models.protocol import BASE, Engine
from router.classifier import Reason
from router.config import Config
from router.desk import Desk
from router.feedback import FeedbackStore
from router.loading import load_classifier, load_knowledge
from router.query import Profile, query_of
from router.schema import ChatRequest, RouteInput, first_fault


def local_desk(config: Config, *, models: bool, rows: int = 1) -> Desk:
    """A Desk in this process that answers `rows` requests at once; without models it routes but cannot answer."""
    engines: dict[str, Engine] = {}
    personas = tuple(p.id for p in config.catalogue())
    if models:
        engine = PersonaPool(
            base=config.base,
            dtype=config.dtype,
            personas=personas,
            manners={p.id: p.manner for p in config.catalogue()},
            engine=config.generation.engine,
            rows=rows,
            queue=rows,
            threads=replica_threads(None, 1),
            gpu=False,
            prefix_mb=config.generation.prefix_cache_mb,
            guess=config.generation.lookup,
            registry_uri=config.registry_uri,
            state=config.state,
        ).engine
        engines = dict.fromkeys([*personas, BASE], engine)
    # Nothing asked at the terminal is recorded.
    return Desk(config, load_classifier(config), load_knowledge(config), engines, FeedbackStore("sqlite://", remember=0))


def explain(desk: Desk, item: RouteInput, *, colour: bool) -> str:
    """Why a request is routed as it is, for the terminal: the decision, every persona's score, the text with its words marked by what they say for the
    leading persona (green and + for, red and - against), and the features behind it."""
    profile = Profile.from_metadata(item.profile)
    block = desk.plan_input(item)
    query = query_of(item.turns(), profile)
    scores = desk.classifier.score([query])[0]
    leading = max(scores.personas, key=lambda p: scores.personas[p])
    reasons = desk.classifier.explain(query, leading)
    lines = [f"{block.decision}: {block.persona or '-'} ({block.confidence:.2f})", ""]
    lines += [f"  {name:<18}{p:6.2f}  {'█' * round(40 * p)}" for name, p in sorted(scores.personas.items(), key=lambda item: -item[1])]
    lines += ["", f"  a request at all: {scores.in_domain:.2f} (needs {scores.min_in_domain:.2f})"]
    lines += [f"  the sender can be told: {scores.known:.2f} (needs {scores.min_known:.2f})", ""]
    if len(block.segments) > 1:
        lines += [f"  {n}. {s.persona or '-'}: {s.text}" for n, s in enumerate(block.segments, 1)] + [""]
    lines += [
        _marked(query.turns[0] if query.turns else query.text, reasons, desk.classifier.space.text.words, colour),
        "",
        f"for {leading}, in log-odds:",
    ]
    strongest = sorted(reasons, key=lambda r: -abs(r.weight))[:12]
    lines += [f"  {_painted(f'{r.weight:+.2f}', r.weight, colour)}  {r.feature}" for r in sorted(strongest, key=lambda r: -r.weight)]
    return "\n".join(lines)


# Log-odds from which a word is marked once, twice, three times.
_STRENGTHS = (0.15, 0.5, 1.2)


def _marked(text: str, reasons: Sequence[Reason], words: Callable[[str], list[str]], colour: bool) -> str:
    """A text whose words carry what they say: a colour, or without colours + and - behind them."""
    weights: defaultdict[str, float] = defaultdict(float)
    for reason in reasons:
        if reason.feature.startswith("word"):
            # A pair's weight is shared by its words.
            behind = reason.feature.split('"')[1].split()
            for word in behind:
                weights[word] += reason.weight / len(behind)

    def mark(match: re.Match[str]) -> str:
        word = match[0]
        weight = weights[" ".join(words(word))]
        strength = sum(abs(weight) >= s for s in _STRENGTHS)
        if not strength:
            return word
        return _painted(word, weight, True, strength) if colour else word + ("+" if weight > 0 else "-") * strength

    return re.sub(r"\w+(?:['’-]\w+)*", mark, text)


def _painted(text: str, weight: float, colour: bool, strength: int = 3) -> str:
    if not colour:
        return text
    return f"\x1b[{'1;' if strength == 3 else ''}{32 if weight > 0 else 31}m{text}\x1b[0m"


async def ask(desk: Desk, text: str, model: str, profile: dict[str, str]) -> None:
    """Stream an answer to the terminal, with a line on how it was routed."""
    request = _request(text, model, profile)
    plan = await desk.begin(request)
    block = plan.block
    article = f"; article: {block.sources[0].title} ({block.sources[0].score:.2f})" if block.sources else "; no article"
    who = block.persona or BASE
    print(f"[{block.decision}: {who} {block.confidence:.2f}{article if block.decision != 'decline' else ''}]", file=sys.stderr)
    async for event in desk.answer(request, plan):
        print(event.text, end="", flush=True)
    print()
    for engine in set(desk.engines.values()):
        await engine.close()


def route_file(desk: Desk, path: Path, out: Path | None) -> None:
    """Score a JSONL file line by line. Raises InputError that names the line; the output file appears only when it is complete."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    results = []
    for number, line in enumerate(tqdm(lines, desc="route", unit="prompt", disable=out is None), 1):
        if not line.strip():
            continue
        try:
            item = RouteInput.model_validate(json.loads(line))
            results.append({"id": item.id, **desk.plan_input(item).model_dump()})
        except json.JSONDecodeError as e:
            raise InputError(f"{path}, line {number}: is not valid JSON ({e.msg})") from None
        except ValidationError as e:
            raise InputError(f"{path}, line {number}: {first_fault(e.errors()).message}") from None
        except DeskrouteError as e:
            raise InputError(f"{path}, line {number}: {e.message}") from None
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results)
    if out is None:
        sys.stdout.write(text)
    else:
        partial = out.with_name(out.name + ".partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(out)
        except OSError as e:
            raise InputError(f"{out}: cannot be written ({e.strerror})") from None


def _request(text: str, model: str, profile: dict[str, str]) -> ChatRequest:
    try:
        return ChatRequest.model_validate({"model": model, "messages": [{"role": "user", "content": text}], "metadata": profile})
    except ValidationError as e:
        raise first_fault(e.errors()) from None
