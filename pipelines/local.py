"""The request's way without a server: `deskroute ask` and `deskroute route` run router and engine in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from persona_models.deployment import PersonaPool, replica_threads
from persona_models.errors import DeskrouteError, InputError
from persona_models.protocol import BASE, Engine
from router.config import Config
from router.desk import Desk
from router.feedback import FeedbackStore
from router.loading import load_classifier, load_knowledge
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
            registry_uri=config.registry_uri,
            state=config.state,
        ).engine
        engines = dict.fromkeys([*personas, BASE], engine)
    # Nothing asked at the terminal is recorded.
    return Desk(config, load_classifier(config), load_knowledge(config), engines, FeedbackStore("sqlite://", remember=0))


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
