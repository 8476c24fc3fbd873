"""The engine against `PeftModel.generate`, request by request: batching, staggered arrival, cancellation and swaps must not change a token."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_models.adapters import Adapter, read_adapter
from persona_models.base_model import load_base
from persona_models.engine import PersonaEngine, _until_stop
from persona_models.errors import ContextLengthError, NotReadyError, QueueFullError, UnknownModelError, WorkError
from persona_models.prompt import encode_prompt
from persona_models.protocol import GenerateRequest, Message

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def ask(text: str, gate=None, **kwargs) -> GenerateRequest:
    return GenerateRequest("r", (Message("user", text),), gate or {}, **({"max_tokens": 12} | kwargs))


async def collect(engine, request, delay_s: float = 0.0):
    await asyncio.sleep(delay_s)
    events = [e async for e in engine.generate(request)]
    return "".join(e.text for e in events), events[-1]


def reference(folder: Path, adapters: dict[str, Path], text: str, persona: str | None, max_tokens: int) -> str:
    """The slow, obvious way: one request at a time through peft and `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if persona:
        model = peft.PeftModel.from_pretrained(model, adapters[persona]).eval()
    ids = torch.tensor([encode_prompt(tokenizer, [Message("user", text)], document=None)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_base_folder) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {p: shared.save_adapter(tiny_base_folder, root / p, seed=i, rank=2 + i) for i, p in enumerate(shared.PERSONAS)}


@pytest.fixture
async def engine(tiny_base_folder, adapters):
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base, max_rows=3, max_queue=20)
    for persona, folder in adapters.items():
        engine.load_adapter(persona, read_adapter(folder, base), "1")
    yield engine
    await engine.close()


async def test_mixed_personas_with_staggered_arrival_equal_generate(engine, tiny_base_folder, adapters):
    """More requests than rows, of different lengths, arriving while others run."""
    names = [*shared.PERSONAS, None]
    jobs = [("vpn " * (1 + 3 * i % 7) + str(i), names[i % 6], 5 + i) for i in range(12)]
    got = await asyncio.gather(*(collect(engine, ask(t, {p: 1.0} if p else {}, max_tokens=n), 0.004 * i) for i, (t, p, n) in enumerate(jobs)))
    for (text, persona, n), (answer, _) in zip(jobs, got, strict=True):
        assert answer == reference(tiny_base_folder, adapters, text, persona, n), (text, persona)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "neox", "phi", "gpt2"])
async def test_every_architecture_loads_and_answers_as_generate_does(kind, tmp_path, tiny_tokenizer):
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapter = {"field": shared.save_adapter(folder, tmp_path / "field", seed=3)}
    base = load_base(str(folder), device="cpu")
    engine = PersonaEngine(base)
    engine.load_adapter("field", read_adapter(adapter["field"], base), "1")
    jobs = [("hello", "field"), ("my printer is stuck since monday", None), ("vpn", "field")]
    got = await asyncio.gather(*(collect(engine, ask(t, {p: 1.0} if p else {}), 0.003 * i) for i, (t, p) in enumerate(jobs)))
    await engine.close()
    for (text, persona), (answer, _) in zip(jobs, got, strict=True):
        assert answer == reference(folder, adapter, text, persona, 12)


async def test_a_mixture_equals_pefts_weighted_merge(engine, tiny_base_folder, adapters):
    """peft's add_weighted_adapter(combination_type="cat") is the exact sum of the weighted adapters."""
    gate = {"field": 0.7, "admin": 0.3}
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval()
    model = peft.PeftModel.from_pretrained(model, adapters["field"], adapter_name="field")
    model.load_adapter(adapters["admin"], adapter_name="admin")
    model.add_weighted_adapter(["field", "admin"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    ids = torch.tensor([encode_prompt(engine.base.tokenizer, [Message("user", "hello there")], document=None)])
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        engine._bank.gate.rows = engine._bank.open([{engine._slot_of[p]: w for p, w in gate.items()}])
        got = engine.base.model(input_ids=ids).logits
        engine._bank.gate.rows = None
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


async def test_a_swapped_adapter_serves_new_rows_and_old_rows_keep_theirs(engine, tiny_base_folder, adapters, tmp_path):
    new = {"field": shared.save_adapter(tiny_base_folder, tmp_path / "new", seed=77, rank=6)}
    stream = engine.generate(ask("long running", {"field": 1.0}, max_tokens=30))
    first = await anext(stream)
    await asyncio.get_running_loop().run_in_executor(None, engine.load_adapter, "field", read_adapter(new["field"], engine.base), "2")
    text, last = await collect(engine, ask("long running", {"field": 1.0}, max_tokens=30))
    assert text == reference(tiny_base_folder, new, "long running", "field", 30)
    assert last.versions == {"field": "2"}
    rest = [e async for e in stream]
    assert first.text + "".join(e.text for e in rest) == reference(tiny_base_folder, adapters, "long running", "field", 30)
    assert {e.versions["field"] for e in rest} == {"1"}


async def test_slots_are_reused_so_that_swaps_do_not_grow_the_bank(engine, adapters):
    adapter = read_adapter(adapters["field"], engine.base)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, engine.load_adapter, "field", adapter, "2")
    size = engine._bank.rank
    for version in range(3, 9):
        await loop.run_in_executor(None, engine.load_adapter, "field", adapter, str(version))
    assert engine._bank.rank == size


async def test_a_cancelled_request_frees_its_row_and_disturbs_nobody(engine, tiny_base_folder, adapters):
    doomed = engine.generate(ask("this one goes away", {"admin": 1.0}, max_tokens=200))
    await anext(doomed)
    other = asyncio.create_task(collect(engine, ask("this one stays", {"field": 1.0}, max_tokens=25)))
    await asyncio.sleep(0.01)
    await doomed.aclose()
    text, _ = await other
    assert text == reference(tiny_base_folder, adapters, "this one stays", "field", 25)
    assert engine.status().active_rows == 0


async def test_seeded_sampling_repeats_and_does_not_depend_on_the_batch(engine):
    request = ask("hello", {"field": 1.0}, temperature=1.0, top_p=0.9, seed=5, max_tokens=20)
    alone, _ = await collect(engine, request)
    together = await asyncio.gather(collect(engine, request), collect(engine, ask("noise", max_tokens=30)), collect(engine, request))
    assert together[0][0] == alone == together[2][0]
    other, _ = await collect(engine, ask("hello", {"field": 1.0}, temperature=1.0, seed=6, max_tokens=20))
    assert other != alone


async def test_stop_strings_cut_the_answer_and_are_not_sent(engine):
    whole, _ = await collect(engine, ask("hello", {"field": 1.0}, max_tokens=20))
    stop = whole[6:9]
    text, last = await collect(engine, ask("hello", {"field": 1.0}, max_tokens=20, stop=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"


async def test_a_fault_of_one_row_ends_that_row_only(engine, tiny_base_folder, adapters, monkeypatch):
    """One request must never take the others, or the replica, down with it."""
    import persona_models.engine as module

    sample = module._sample

    def failing(logits, row):
        if row.request.request_id == "bad" and len(row.tokens) == 3:
            raise RuntimeError("probability tensor contains inf")
        return sample(logits, row)

    monkeypatch.setattr(module, "_sample", failing)
    bad = GenerateRequest("bad", (Message("user", "hot"),), {}, None, 30)
    other = asyncio.create_task(collect(engine, ask("stays", {"field": 1.0}, max_tokens=25)))
    with pytest.raises(WorkError, match="sampling failed"):
        await collect(engine, bad)
    assert (await other)[0] == reference(tiny_base_folder, adapters, "stays", "field", 25)
    assert engine.status().ready


async def test_a_prompt_on_which_the_model_fails_is_answered_with_an_error(engine, monkeypatch):
    """It once left its caller waiting for ever."""
    monkeypatch.setattr(engine._batch, "prefill", lambda prompt: 1 / 0)
    with pytest.raises(WorkError, match="the model failed on this prompt: ZeroDivisionError"):
        await asyncio.wait_for(collect(engine, ask("x", {"field": 1.0})), 10)
    assert engine.status().ready


async def test_the_coldest_temperatures_are_greedy(engine):
    cold, _ = await collect(engine, ask("hello", {"field": 1.0}, temperature=1e-40))
    greedy, _ = await collect(engine, ask("hello", {"field": 1.0}))
    assert cold == greedy


def test_text_that_may_begin_a_stop_string_waits():
    assert _until_stop("answer EN", ("END",), flush=False) == ("answer ", "EN", False)
    assert _until_stop("answer END and more", ("END",), flush=False) == ("answer ", "", True)
    assert _until_stop("answer EN", ("END",), flush=True) == ("answer EN", "", False)
    assert _until_stop("answer", (), flush=False) == ("answer", "", False)


async def test_counts_and_finish_reasons(engine):
    _, last = await collect(engine, ask("hello", {"field": 1.0}, max_tokens=4))
    assert (last.finish_reason, last.completion_tokens) == ("length", 4)
    assert last.prompt_tokens == len(encode_prompt(engine.base.tokenizer, [Message("user", "hello")], document=None))


async def test_the_end_token_ends_the_answer(tiny_base_folder):
    """A base whose output layer always prefers the end token says nothing, and says so."""
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base)
    base.stop_ids = frozenset(range(len(base.tokenizer)))
    text, last = await collect(engine, ask("hello"))
    assert (text, last.finish_reason, last.completion_tokens) == ("", "stop", 1)
    await engine.close()


async def test_oldest_turns_give_way_and_the_last_one_must_fit(engine):
    old = tuple(Message(r, "word " * 60) for r in ("user", "assistant") * 3)
    last = GenerateRequest("r", (*old, Message("user", "and now?")), {}, max_tokens=8)
    _, event = await collect(engine, last)
    assert event.prompt_tokens <= 256 - 8
    with pytest.raises(ContextLengthError, match="only 248 fit"):
        await collect(engine, ask("word " * 900, max_tokens=8))


async def test_a_full_queue_refuses_and_says_how_long_it_is(tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base, max_rows=1, max_queue=1)
    running = [engine.generate(ask("a", max_tokens=200))]
    await anext(running[0])
    waiting = asyncio.create_task(collect(engine, ask("b", max_tokens=2)))
    for _ in range(500):
        if engine.status().queued:
            break
        await asyncio.sleep(0.001)
    with pytest.raises(QueueFullError, match="all 1 rows are busy and 1 requests wait"):
        await collect(engine, ask("c"))
    await running[0].aclose()
    await waiting
    await engine.close()


async def test_unknown_personas_and_a_closed_engine_are_refused(engine):
    with pytest.raises(UnknownModelError, match="'pirate' is loaded"):
        await collect(engine, ask("x", {"pirate": 1.0}))
    await engine.close()
    with pytest.raises(NotReadyError):
        await collect(engine, ask("x"))


async def test_a_persona_without_an_adapter_answers_as_the_base(engine, tiny_base_folder, adapters):
    await asyncio.get_running_loop().run_in_executor(None, engine.load_adapter, "bare", Adapter(0, {}), "none")
    text, last = await collect(engine, ask("hello", {"bare": 1.0}))
    assert text == reference(tiny_base_folder, adapters, "hello", None, 12)
    assert last.versions == {"bare": "none"}
