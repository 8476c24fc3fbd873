"""`deskroute bench router|engine|gateway`: how fast, in this run on this machine. Medians, and ratios within one run, since machines are noisy.

The engine's half imports neither Ray nor MLflow.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persona_models.errors import InputError
from persona_models.protocol import GenerateRequest, Message

PROMPTS = (
    "My VPN keeps dropping at the customer's site, no Wi-Fi here",
    "the payroll run does not post and the invoices must go out today",
    "board papers do not open on the tablet",
    "git push is rejected since this morning",
    "second day here, where do I find the printer",
)


def bench(what: str, out: Path | None, config: Any) -> None:
    """Run one benchmark, print its table, and write it as JSON where asked."""
    runs: dict[str, Callable[[Any], list[dict[str, Any]]]] = {"router": bench_router, "engine": bench_engine, "gateway": bench_gateway}
    if what not in runs:
        raise InputError(f"bench: {what!r} is not one of {', '.join(runs)}")
    rows = runs[what](config)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    widths = [max(len(c), *(len(_cell(r.get(c, ""))) for r in rows)) + 2 for c in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("".join(_cell(row.get(c, "")).ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())
    if out:
        out.write_text(json.dumps({"bench": what, "cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def bench_router(config: Any) -> list[dict[str, Any]]:
    """Milliseconds per prompt of each part of a routing decision."""
    from router.features import Query
    from router.loading import load_classifier, load_knowledge

    classifier, knowledge = load_classifier(config), load_knowledge(config)
    parts: dict[str, Callable[[str], Any]] = {
        "persona and in-domain score": lambda t: classifier.score([Query(t)]),
        "article": knowledge.best,
        "both": lambda t: (classifier.score([Query(t)]), knowledge.best(t)),
    }
    rows = []
    for name, run in parts.items():
        times = []
        for i in range(400):
            began = time.perf_counter()
            run(f"{PROMPTS[i % len(PROMPTS)]} {i}")
            times.append(1000 * (time.perf_counter() - began))
        rows.append({"part": name, **_spread(times[20:], "ms")})
    return rows


def bench_engine(config: Any) -> list[dict[str, Any]]:
    """Tokens a second at several loads: our engine on the base, on five personas mixed, and peft's and transformers' own ways."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from persona_models.adapters import builtin_adapter, read_adapter
    from persona_models.base_model import base_folder, load_base
    from persona_models.engine import PersonaEngine
    from persona_models.prompt import encode_prompt

    personas = [p.id for p in config.catalogue() if builtin_adapter(p.id)]
    base = load_base(config.base, dtype=config.dtype)
    engine = PersonaEngine(base, max_rows=64)
    for persona in personas:
        engine.load_adapter(persona, read_adapter(builtin_adapter(persona), base), "1")  # type: ignore[arg-type]
    reference = AutoModelForCausalLM.from_pretrained(base_folder(config.base), dtype=base.model.dtype).to(base.device).eval()
    tokens = 64
    base.stop_ids = frozenset()  # every answer as long as asked, so that the ways do the same work

    async def ours(n: int, mixed: bool) -> float:
        async def one(i: int) -> None:
            gate = {personas[i % len(personas)]: 1.0} if mixed and personas else {}
            request = GenerateRequest(str(i), (Message("user", PROMPTS[i % len(PROMPTS)]),), gate, None, tokens)
            async for _ in engine.generate(request):
                pass

        began = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(n)))
        return n * tokens / (time.perf_counter() - began)

    def theirs(model: Any, n: int, **kwargs: Any) -> float:
        ids = [encode_prompt(base.tokenizer, [Message("user", PROMPTS[i % len(PROMPTS)])], document=None) for i in range(n)]
        batch = base.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(base.device)
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(**batch, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **kwargs)
        return n * tokens / (time.perf_counter() - began)

    loads = (1, 4, 16)
    results: dict[str, dict[int, list[float]]] = {}
    mixed_model = None
    if personas:
        mixed_model = PeftModel.from_pretrained(reference, builtin_adapter(personas[0]), adapter_name=personas[0])  # type: ignore[arg-type]
        for persona in personas[1:]:
            mixed_model.load_adapter(builtin_adapter(persona), adapter_name=persona)
        mixed_model.eval()
    plain = AutoModelForCausalLM.from_pretrained(base_folder(config.base), dtype=base.model.dtype).to(base.device).eval()
    for repeat in range(4):
        for n in loads:
            measured = {"engine, base": asyncio.run(ours(n, False)), "generate, base": theirs(plain, n)}
            if mixed_model is not None:
                names = [personas[i % len(personas)] for i in range(n)]
                measured |= {
                    "engine, personas mixed": asyncio.run(ours(n, True)),
                    "peft adapter_names, mixed": theirs(mixed_model, n, adapter_names=names),
                }
            if repeat:  # the first round warms up
                for way, rate in measured.items():
                    results.setdefault(way, {}).setdefault(n, []).append(rate)
    asyncio.run(engine.close())
    base_rate = {n: statistics.median(results["engine, base"][n]) for n in loads}
    rows = []
    for way, by_load in results.items():
        row: dict[str, Any] = {"way": way}
        for n in loads:
            rate = statistics.median(by_load[n])
            row |= {f"tokens/s at {n}": round(rate), f"of engine's base at {n}": round(rate / base_rate[n], 2)}
        rows.append(row)
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

    ask = {"model": "auto", "messages": [{"role": "user", "content": PROMPTS[0]}]}
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
    return rows


def _spread(times: Sequence[float], unit: str) -> dict[str, float]:
    ranked = sorted(times)
    return {
        f"{name} {unit}": round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def _cell(value: Any) -> str:
    return str(value)
