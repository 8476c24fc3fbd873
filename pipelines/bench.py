"""`deskroute bench router|engine|gateway|finetune|mixture`: how fast, or how well, in this run on this machine. Medians, and ratios within one run, since
machines are noisy.

The engine's half imports neither Ray nor MLflow.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from persona_models.errors import InputError
from persona_models.heap import keep_loaded
from pipelines.workload import LONG_PROMPT, REQUESTS

# What a benchmark has found, a part at a time: rows and notes.
Found = Iterator[tuple[list[dict[str, Any]], list[str]]]


def bench(what: str, out: Path | None, config: Any) -> None:
    """Run one benchmark, print its table, draw it where it has a picture, and write it as JSON where asked. Raises InputError for an unknown one."""
    runs: dict[str, tuple[Callable[[Any], Found], Callable[[list[dict[str, Any]]], Any] | None]] = {
        "router": (_router, _router_picture),
        "engine": (_engine, _engine_picture),
        "gateway": (_gateway, None),
        "finetune": (_finetune, None),
        "mixture": (_mixture, _mixture_picture),
    }
    if what not in runs:
        raise InputError(f"bench: {what!r} is not one of {', '.join(runs)}")
    run, picture = runs[what]
    drawn = out.with_suffix(".png") if out else config.state / "bench" / f"{what}.png"
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    # A long run: what is finished is shown and kept, whatever becomes of the rest.
    for found, said in run(config):
        rows, notes = rows + found, notes + said
        _report(found, said)
        _write(out, what, rows, notes)
        if picture and (figure := picture(rows)):
            drawn.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(drawn, dpi=130)
    if picture:
        print(f"drawn in {drawn}")


def _router(config: Any) -> Found:
    from pipelines.bench_router import bench_router

    yield bench_route(config), []
    yield bench_router(config)


def _router_picture(rows: list[dict[str, Any]]) -> Any:
    from pipelines import plots

    compared = [r for r in rows if "router" in r]
    return plots.routers(compared) if compared else None


def _engine(config: Any) -> Found:
    from pipelines.bench_engine import bench_engine

    yield from bench_engine(config)


def _engine_picture(rows: list[dict[str, Any]]) -> Any:
    from pipelines import plots

    rates: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        rates.setdefault(row["base"], {}).setdefault(row["way"], {})[row["requests"]] = row["tokens/s"]
    return plots.throughput(rates)


def _gateway(config: Any) -> Found:
    yield bench_gateway(config), []


def _finetune(config: Any) -> Found:
    from pipelines.bench_finetune import bench_finetune

    yield bench_finetune(config), []


def _mixture(config: Any) -> Found:
    from pipelines.mixture import study

    yield study(config), []


def _mixture_picture(rows: list[dict[str, Any]]) -> Any:
    from pipelines import plots

    return plots.mixture(rows)


def _report(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """The rows as a table."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    widths = [max(len(c), *(len(_cell(r.get(c, ""))) for r in rows)) + 2 for c in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("".join(_cell(row.get(c, "")).ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())
    for note in notes:
        print(note)


def _write(out: Path | None, what: str, rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    if out:
        about = {"bench": what, "cpus": os.cpu_count(), "notes": notes, "rows": rows}
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def bench_route(config: Any) -> list[dict[str, Any]]:
    """Milliseconds per prompt of each part of a routing decision."""
    from router.loading import load_classifier, load_knowledge
    from router.query import Query
    from router.segment import Segmenter, requests_in

    classifier, knowledge = load_classifier(config), load_knowledge(config)
    segmenter = Segmenter.from_facts(classifier.segments)
    parts: dict[str, Callable[[str], Any]] = {
        "persona and in-domain score": lambda t: classifier.score([Query(t)]),
        "requests in it": lambda t: requests_in(classifier, segmenter, Query(t), config.policy),
        "article": knowledge.best,
    }
    if (matters := classifier.matters) and segmenter:
        parts["matters in it"] = lambda t: matters.split(knowledge, segmenter, t)
    parts["all of it"] = lambda t: [run(t) for name, run in parts.items() if name != "all of it"]
    rows = []
    for name, run in parts.items():
        times = []
        for i in range(400):
            text = f"{LONG_PROMPT} {i}"
            began = time.perf_counter()
            run(text)
            times.append(1000 * (time.perf_counter() - began))
        rows.append({"part": name, **_spread(times[20:], "ms")})
    return rows


def bench_gateway(config: Any) -> list[dict[str, Any]]:
    """Requests a second and latency through a real server on the fake engine: everything but the model."""
    import httpx

    from router.server import running

    fake = config.model_copy(update={"generation": config.generation.model_copy(update={"engine": "fake"})})
    url = f"http://{config.http.host}:{config.http.port}/v1"
    rows = []

    async def load(path: str, body: dict[str, Any], at_once: int, seconds: float) -> list[float]:
        times: list[float] = []
        async with httpx.AsyncClient(timeout=60) as client:
            stop = time.perf_counter() + seconds

            async def one() -> None:
                while time.perf_counter() < stop:
                    began = time.perf_counter()
                    (await client.post(url + path, json=body)).raise_for_status()
                    times.append(1000 * (time.perf_counter() - began))

            await asyncio.gather(*(one() for _ in range(at_once)))
        return times

    ask = {"model": "auto", "messages": [{"role": "user", "content": REQUESTS[0].text}]}
    with running(fake):
        for name, path, body in (
            ("route", "/route", ask),
            ("chat", "/chat/completions", ask),
            ("chat, streamed", "/chat/completions", ask | {"stream": True}),
        ):
            for at_once in (1, 16):
                asyncio.run(load(path, body, at_once, 1.0))
                times = asyncio.run(load(path, body, at_once, 4.0))
                rows.append({"request": name, "at once": at_once, "requests/s": round(len(times) / 4.0), **_spread(times, "ms")})
    return rows + _bench_served(config, url)


# Clients of the served benchmark, how many answers each asks for, one after the other, in a round, and the rounds that count (one more warms up).
CLIENTS, ANSWERS, ROUNDS = 16, 4, 9


def _bench_served(config: Any, url: str) -> list[dict[str, Any]]:
    """Sixteen clients, five personas, a new request as soon as an answer has ended: the engine in this process, then the same as streams from a server.

    The clients share the server's cores, which people's own would not: they read with aiohttp, which takes half the time that httpx takes.
    """
    import aiohttp

    from pipelines.local import local_desk
    from router.schema import ChatRequest
    from router.server import running

    def bodies(client: int, round_: int) -> list[dict[str, Any]]:
        """What a client asks in a round; no text comes twice, though answers are alike, which helps engine and server alike."""
        asked = [REQUESTS[(client + n) % len(REQUESTS)] for n in range(ANSWERS)]
        return [
            {"model": a.persona, "messages": [{"role": "user", "content": f"{a.text} ({round_}, {client}, {n})"}], "max_tokens": 400}
            for n, a in enumerate(asked)
        ]

    desk = local_desk(config, models=True, rows=CLIENTS)
    keep_loaded()  # as the server does

    async def alone(round_: int) -> float:
        async def one(client: int) -> int:
            tokens = 0
            for body in bodies(client, round_):
                request = ChatRequest.model_validate(body)
                last = [event async for event in desk.answer(request, await desk.begin(request))][-1]
                tokens += last.completion_tokens
            return tokens

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(c) for c in range(CLIENTS)))
        return sum(counts) / (time.perf_counter() - began)

    async def streamed(round_: int) -> float:
        async def one(http: aiohttp.ClientSession, client: int) -> int:
            tokens = 0
            for body in bodies(client, round_):
                asked = body | {"stream": True, "stream_options": {"include_usage": True}}
                async with http.post(url + "/chat/completions", json=asked, raise_for_status=True) as answer:
                    async for line in answer.content:
                        if line.startswith(b"data: {") and b'"usage"' in line:
                            tokens += (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
            return tokens

        async with aiohttp.ClientSession() as http:
            began = time.perf_counter()
            counts = await asyncio.gather(*(one(http, c) for c in range(CLIENTS)))
            return sum(counts) / (time.perf_counter() - began)

    async def in_turn() -> list[tuple[float, float]]:
        """The idle server beside costs this process a little; but a slow moment of the machine hits both."""
        rates = [(await alone(r), await streamed(r)) for r in range(1 + ROUNDS)]
        for engine in set(desk.engines.values()):
            await engine.close()
        return rates[1:]

    with running(config):
        rates = asyncio.run(in_turn())
    own, through = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(t / o for o, t in rates)
    return [
        {"request": "answers in this process", "at once": CLIENTS, "tokens/s": round(own)},
        {"request": "the same as streams over HTTP", "at once": CLIENTS, "tokens/s": round(through), "of in-process": round(ratio, 3)},
    ]


def _spread(times: Sequence[float], unit: str) -> dict[str, float]:
    ranked = sorted(times)
    return {
        f"{name} {unit}": round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def _cell(value: Any) -> str:
    return str(value)


def main(out: Path, only: Sequence[str]) -> None:
    """`python -m pipelines.bench OUT.json [BASE ...]`: the engine's benchmark on a machine that has torch, transformers and peft alone."""
    from types import SimpleNamespace

    from persona_models.protocol import BUILTIN
    from pipelines.bench_engine import bench_engine

    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for found, said in bench_engine(SimpleNamespace(base=BUILTIN, dtype="auto"), *only):
        rows, notes = rows + found, notes + said
        _report(found, said)
        _write(out, "engine", rows, notes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
