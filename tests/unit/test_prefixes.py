"""Prompts that begin alike are read once, and no answer differs for it from `PeftModel.generate`, which remembers nothing."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

from persona_models import engine as engine_module
from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.engine import PersonaEngine
from persona_models.errors import WorkError
from persona_models.prefixes import BLOCK_TOKENS, Prefixes
from persona_models.prompt import encode_prompt
from persona_models.protocol import GenerateRequest, Message
from persona_models.row_cache import RowCache

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

ARTICLE = "Article: the printer prints nothing. 1. Switch it off and on. 2. Choose the printer on the second floor. 3. Print a test page. "


def ask(messages: list[Message], gate=None, document: str | None = ARTICLE, **kwargs) -> GenerateRequest:
    return GenerateRequest("r", tuple(messages), gate or {}, document, **({"max_tokens": 12} | kwargs))


async def collect(engine, request):
    events = [e async for e in engine.generate(request)]
    return "".join(e.text for e in events), events[-1]


def reference(folder: Path, adapter: Path | None, messages: list[Message], max_tokens: int) -> str:
    return shared.generated(folder, adapter, messages, max_tokens, ARTICLE)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "neox", "phi", "gpt2"])
async def test_answers_behind_a_remembered_beginning_equal_generate(kind, tmp_path, tiny_tokenizer):
    """Personas mixed, two requests about one article each, and then the conversation's next turn."""
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapters = {p: shared.save_adapter(folder, tmp_path / p, seed=i) for i, p in enumerate(("field", "admin"))}
    base = load_base(str(folder), device="cpu")
    engine = PersonaEngine(base)
    for persona, path in adapters.items():
        engine.load_adapter(persona, read_adapter(path, base), "1")
    for texts, remembered in ((("vpn", "mouse"), False), (("a new laptop", "the printer again"), True)):
        jobs = [(p, [Message("user", f"{t} {p}")]) for p, t in zip(("field", "admin"), texts, strict=True)]
        found = await asyncio.gather(*(collect(engine, ask(m, {p: 1.0})) for p, m in jobs))
        for (persona, messages), (text, last) in zip(jobs, found, strict=True):
            assert text == reference(folder, adapters[persona], messages, 12)
            assert (last.cached_tokens > 0) == remembered, "the other persona's reading must not be taken"
            assert last.cached_tokens < last.prompt_tokens
    # Words, and not the twelve random tokens of such a model, which would be cut otherwise when they are read as text again.
    talk = [*jobs[0][1], Message("assistant", "switch it off and on"), Message("user", "and now")]
    text, last = await collect(engine, ask(talk, {"field": 1.0}))
    assert text == reference(folder, adapters["field"], talk, 12)
    assert last.cached_tokens >= len(encode_prompt(base.tokenizer, jobs[0][1], document=ARTICLE)) // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS
    text, last = await collect(engine, ask(jobs[0][1]))
    assert (text, last.cached_tokens) == (reference(folder, None, jobs[0][1], 12), 0), "the base never read it"
    await engine.close()


async def test_a_new_version_remembers_nothing_of_the_old_one(tmp_path, tiny_base_folder):
    adapters = [shared.save_adapter(tiny_base_folder, tmp_path / str(i), seed=i) for i in range(2)]
    base = load_base(str(tiny_base_folder), device="cpu")
    messages = [Message("user", "vpn")]
    for merged in (None, "field"):
        engine = PersonaEngine(base, merged=merged)
        taken = []
        for version, path in enumerate(adapters):
            engine.load_adapter("field", read_adapter(path, base), str(version))
            for remembered in (False, True):
                text, last = await collect(engine, ask(messages, {"field": 1.0}))
                assert text == reference(tiny_base_folder, path, messages, 12)
                assert (last.cached_tokens > 0) == remembered
            # Two times the article and the same question, whichever version it is: nothing of the other one is left.
            taken.append(engine._prefixes.bytes)
        assert taken[0] == taken[1] > 0
        await engine.close()
        engine.uninstall()


async def test_a_row_that_ends_on_a_version_let_go_leaves_nothing(tmp_path, tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base)
    adapters = [read_adapter(shared.save_adapter(tiny_base_folder, tmp_path / str(i), seed=i), base) for i in range(2)]
    engine.load_adapter("field", adapters[0], "0")
    stream = engine.generate(ask([Message("user", "vpn")], {"field": 1.0}, max_tokens=40, min_tokens=40))
    await anext(stream)
    await asyncio.get_running_loop().run_in_executor(None, engine.load_adapter, "field", adapters[1], "1")
    assert [e async for e in stream][-1].versions == {"field": "0"}
    await collect(engine, ask([Message("user", "vpn")]))  # when this one has ended, so has the row before
    assert {adapter for block in engine._prefixes._blocks.values() for adapter in block.adapters} == set()
    await engine.close()


async def test_what_a_failed_reading_left_is_not_remembered(tiny_base_folder, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK_TOKENS", BLOCK_TOKENS)
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base)
    engine._between_steps(lambda: None, alone=False)  # the engine has warmed up
    messages = [Message("user", "vpn")]
    whole = engine._decoder.prefill

    def half(row, ids):
        logits = whole(row, ids)
        if engine._decoder.cache.lengths[row] == 2 * BLOCK_TOKENS:
            for keys in engine._decoder.cache.keys:
                keys[row, :, BLOCK_TOKENS:] = float("nan")
            raise RuntimeError("on purpose")
        return logits

    monkeypatch.setattr(engine._decoder, "prefill", half)
    with pytest.raises(WorkError):
        await collect(engine, ask(messages))
    monkeypatch.setattr(engine._decoder, "prefill", whole)
    text, last = await collect(engine, ask(messages))
    assert (text, last.cached_tokens) == (reference(tiny_base_folder, None, messages, 12), BLOCK_TOKENS)
    await engine.close()


async def test_without_memory_nothing_is_remembered(tiny_base_folder):
    engine = PersonaEngine(load_base(str(tiny_base_folder), device="cpu"), prefix_mb=0)
    for _ in range(2):
        _, last = await collect(engine, ask([Message("user", "vpn")]))
        assert last.cached_tokens == 0
    await engine.close()


def _write(cache: RowCache, row: int, tokens: list[int]) -> None:
    """Give a row states that tell their token."""
    cache.clear(row)
    start = cache.grow(row, len(tokens))
    for layer in range(2):
        states = torch.tensor(tokens, dtype=torch.float32)[None, :, None].expand(1, -1, 4)
        cache.put_chunk(layer, row, start, states + layer, states - layer)


def test_blocks_asked_for_longest_ago_go_first_and_none_before_those_that_hang_on_it():
    cache = RowCache(2, 2, 256, torch.float32, torch.device("cpu"))
    block_bytes = 4 * BLOCK_TOKENS * 4 * 4
    prefixes = Prefixes(cache, 6 * block_bytes)

    def said(start: int, blocks: int) -> list[int]:
        tokens = list(range(start, start + blocks * BLOCK_TOKENS))
        _write(cache, 0, tokens)
        prefixes.keep(0, {}, tokens)
        return tokens

    def known(tokens: list[int]) -> int:
        """Blocks; found in two goes."""
        cache.clear(1)
        found = prefixes.recall(1, {}, [*tokens, 0], BLOCK_TOKENS)
        return (found + prefixes.recall(1, {}, [*tokens, 0], 10_000)) // BLOCK_TOKENS

    first, second, third = said(0, 3), said(500, 2), said(900, 1)
    assert prefixes.bytes == 6 * block_bytes
    assert (known(second), known(first), known(third)) == (2, 3, 1)
    fourth = said(1300, 1)
    assert (known(second), known(fourth), known(first), known(third)) == (1, 1, 3, 1), "the end of the oldest one goes"
    long = said(2000, 7)
    assert known(long) == 3, "no prompt takes more than half"
    assert prefixes.bytes <= 6 * block_bytes
    assert torch.equal(cache.read(1, 0, 3 * BLOCK_TOKENS)[0, 0, :, 0], torch.arange(2000.0, 2000.0 + 3 * BLOCK_TOKENS))


def test_where_memory_fails_everything_is_forgotten_and_nothing_breaks(monkeypatch):
    cache = RowCache(2, 2, 256, torch.float32, torch.device("cpu"))
    prefixes = Prefixes(cache, 10**6)
    tokens = list(range(2 * BLOCK_TOKENS))

    def fails(*_):
        raise RuntimeError("out of memory")

    for method in ("read", "fill"):
        _write(cache, 0, tokens)
        prefixes.keep(0, {}, tokens)
        assert prefixes.bytes
        cache.clear(1)
        with monkeypatch.context() as patch:
            patch.setattr(cache, method, fails)
            if method == "read":
                prefixes.keep(0, {"field#1": 1.0}, tokens)
            assert prefixes.recall(1, {}, [*tokens, 7], 10_000) == cache.lengths[1] == prefixes.bytes == 0


def test_a_beginning_is_found_only_behind_the_same_adapters_and_the_same_tokens_before():
    cache = RowCache(2, 2, 256, torch.float32, torch.device("cpu"))
    prefixes = Prefixes(cache, 10**6)
    tokens = list(range(2 * BLOCK_TOKENS))
    _write(cache, 0, tokens)
    prefixes.keep(0, {"field#1": 1.0}, tokens)
    for gate, asked, known in (
        ({"field#1": 1.0}, [*tokens, 7], 2 * BLOCK_TOKENS),
        ({"field#1": 1.0}, tokens, BLOCK_TOKENS),
        ({"field#1": 1.0}, [7, *tokens[1:], 7], 0),
        ({"field#1": 1.0}, [*tokens[BLOCK_TOKENS:], 7], 0),
        ({"field#1": 0.9}, [*tokens, 7], 0),
        ({"field#2": 1.0}, [*tokens, 7], 0),
        ({}, [*tokens, 7], 0),
    ):
        cache.clear(1)
        assert prefixes.recall(1, gate, asked, 10_000) == known == cache.lengths[1]
