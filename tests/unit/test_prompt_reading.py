"""What is read between two steps: several short prompts, a part of a long one, never more than a chunk, and what can be remembered from memory."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from pathlib import Path

import pytest

from persona_models import engine as engine_module
from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.engine import CHUNK_TOKENS, LEAST_TOKENS, PersonaEngine
from persona_models.errors import WorkError
from persona_models.prompt import encode_prompt
from persona_models.protocol import GenerateRequest, Message

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def ask(text: str, gate=None, **kwargs) -> GenerateRequest:
    return GenerateRequest("r", (Message("user", text),), gate or {}, **({"max_tokens": 6} | kwargs))


async def collect(engine, request):
    events = [e async for e in engine.generate(request)]
    return "".join(e.text for e in events), events[-1]


def watched(engine) -> list[int | str]:
    """The tokens of the engine's prefills to come, and "step" for each step."""
    log: list[int | str] = []
    engine._between_steps(lambda: None, alone=False)  # the engine has warmed up
    prefill, step = engine._decoder.prefill, engine._decoder.step
    engine._decoder.prefill = lambda row, ids: (log.append(len(ids)), prefill(row, ids))[1]
    engine._decoder.step = lambda tokens: (log.append("step"), step(tokens))[1]
    return log


async def until(condition) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


async def all_at_once(engine, requests):
    """The answers to requests that all wait before the first is admitted; an exception in place of one that fails."""
    held = threading.Event()
    holding = asyncio.get_running_loop().run_in_executor(None, lambda: engine._between_steps(held.wait, alone=False))
    tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
    await until(lambda: len(engine._waiting) == len(requests))
    held.set()
    await holding
    return await asyncio.gather(*tasks, return_exceptions=True)


def gaps(log) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for entry in log:
        if entry == "step":
            found.append([])
        else:
            found[-1].append(entry)
    return found


async def test_short_prompts_are_read_together_and_no_more_than_a_chunk(tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base, prefix_mb=0)
    log = watched(engine)
    requests = [ask(f"printer {i}") for i in range(11)]
    got = await all_at_once(engine, requests)
    first, *others = gaps(log)
    assert len(first) == CHUNK_TOKENS // LEAST_TOKENS
    assert sum(map(len, others)) == len(requests) - len(first)
    log.clear()
    long = [ask("printer " * n, {}) for n in (30, 90, 20, 70, 60)]
    got += await all_at_once(engine, long)
    read = gaps(log)
    assert all(sum(max(LEAST_TOKENS, n) for n in gap) <= CHUNK_TOKENS + LEAST_TOKENS for gap in read)
    assert sum(map(sum, read)) == sum(len(encode_prompt(base.tokenizer, r.messages, document=None)) for r in long)
    assert max(map(len, read)) > 1
    for request, (answer, _) in zip([*requests, *long], got, strict=True):
        assert answer == shared.generated(tiny_base_folder, None, list(request.messages), request.max_tokens)
    await engine.close()


@pytest.mark.parametrize("chunk", [40, 75, 131])
async def test_a_known_beginning_is_remembered_whole_whatever_was_read_before_it(chunk, tiny_base_folder, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(engine_module, "RECALLED", 2)
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base)
    known = "the printer on the second floor " * 6
    await collect(engine, ask(known))
    for before in ("a", "vpn down " * 3, "mail " * 9):
        _, (answer, last) = await all_at_once(engine, [ask(before), ask(f"{known} {before}")])
        assert last.cached_tokens > len(encode_prompt(base.tokenizer, (Message("user", known),), document=None)) - 20
        assert answer == shared.generated(tiny_base_folder, None, [Message("user", f"{known} {before}")], 6)
    await engine.close()


async def test_who_left_or_cannot_be_read_holds_nobody_up(tiny_base_folder, tmp_path):
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base, prefix_mb=0)
    engine.load_adapter("field", read_adapter(shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=1), base), "1")
    log = watched(engine)
    reading = engine._decoder.prefill

    def prefill(row, ids):
        if len(log) == 1:
            log.append(0)
            raise RuntimeError("no memory")
        return reading(row, ids)

    engine._decoder.prefill = prefill
    held = threading.Event()
    holding = asyncio.get_running_loop().run_in_executor(None, lambda: engine._between_steps(held.wait, alone=False))
    leaving = [asyncio.create_task(collect(engine, ask("bye"))) for _ in range(3)]
    staying = []
    await until(lambda: len(engine._waiting) == 3)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    for i, gate in enumerate(({}, {"field": 1.0}, {})):
        staying.append(asyncio.create_task(collect(engine, ask(f"printer {i}", gate))))
        await until(lambda waiting=4 + i: len(engine._waiting) == waiting)
    held.set()
    await holding
    first, broken, last = await asyncio.gather(*staying, return_exceptions=True)
    assert isinstance(broken, WorkError)
    assert "no memory" in broken.message
    assert len(gaps(log)[0]) == 3, "all three were taken up before the first step"
    for i, got in ((0, first), (2, last)):
        assert got[0] == shared.generated(tiny_base_folder, None, [Message("user", f"printer {i}")], 6)
    await engine.close()
