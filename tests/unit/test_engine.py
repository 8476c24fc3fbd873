"""The engine against `PeftModel.generate`, request by request: batching, staggered arrival, cancellation and swaps must not change a token."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_models import engine as engine_module
from persona_models import sampling
from persona_models.adapters import Adapter, read_adapter
from persona_models.answer import until_stop
from persona_models.base_model import load_base
from persona_models.decoder import TransformersDecoder
from persona_models.engine import PersonaEngine
from persona_models.errors import AdapterError, ContextLengthError, InputError, NotReadyError, QueueFullError, UnknownModelError, WorkError
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
    return shared.generated(folder, adapters[persona] if persona else None, [Message("user", text)], max_tokens)


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


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "gpt2"])
async def test_staggered_arrivals_cancellations_and_swaps_change_no_token(kind, tmp_path, tiny_tokenizer, monkeypatch):
    """Everything at once, with prompts read in pieces of five tokens while others answer: each finished answer is still that of `generate`."""
    monkeypatch.setattr(engine_module, "CHUNK_TOKENS", 5)
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapters = {p: shared.save_adapter(folder, tmp_path / p, seed=i, rank=2 + i) for i, p in enumerate(("field", "admin"))}
    new = {"field": shared.save_adapter(folder, tmp_path / "new", seed=50, rank=3)}
    base = load_base(str(folder), device="cpu")
    engine = PersonaEngine(base, max_rows=4)
    for persona, path in adapters.items():
        engine.load_adapter(persona, read_adapter(path, base), "1")

    async def leaves(request, delay_s, after):
        await asyncio.sleep(delay_s)
        stream = engine.generate(request)
        for _ in range(after):
            await anext(stream, None)
        await stream.aclose()

    names = ("field", "admin", None)
    jobs = [("printer " * (1 + 5 * i % 11) + str(i), names[i % 3], 6 + 2 * i) for i in range(9)]
    goers = [leaves(ask("going " * (3 * i + 1), {"admin": 1.0}, max_tokens=60), 0.004 * i, i % 3) for i in range(6)]
    stayers = [collect(engine, ask(t, {p: 1.0} if p else {}, max_tokens=n), 0.005 * i) for i, (t, p, n) in enumerate(jobs)]
    swap = asyncio.get_running_loop().run_in_executor(None, engine.load_adapter, "field", read_adapter(new["field"], base), "2")
    got = await asyncio.gather(*stayers, *goers, swap)
    await engine.close()
    assert engine.status().active_rows == 0
    for (text, persona, n), (answer, last) in zip(jobs, got, strict=False):
        source = new if last.versions.get("field") == "2" else adapters
        assert answer == reference(folder, source, text, persona, n), (text, persona)


async def test_a_mixture_equals_pefts_weighted_merge(engine, tiny_base_folder, adapters):
    """peft's add_weighted_adapter(combination_type="cat") is the exact sum of the weighted adapters."""
    gate = {"field": 0.7, "admin": 0.3}
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval()
    model = peft.PeftModel.from_pretrained(model, adapters["field"], adapter_name="field")
    model.load_adapter(adapters["admin"], adapter_name="admin")
    model.add_weighted_adapter(["field", "admin"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    ids = encode_prompt(engine.base.tokenizer, [Message("user", "hello there")], document=None)
    _, slots = engine._slots.take(gate, {})
    decoders = (engine._decoder, TransformersDecoder(engine.base.model, engine._bank, 2, 256))
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([ids])).logits[0]
        for decoder in decoders:
            decoder.open(0, slots)
            torch.testing.assert_close(decoder.prefill(0, ids[:-2]), want[-3], atol=1e-4, rtol=1e-4)
            for place in (-2, -1):
                torch.testing.assert_close(decoder.step([[ids[place]]])[0, 0], want[place], atol=1e-4, rtol=1e-4)
            decoder.close(0)


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


async def test_a_version_held_beside_the_current_one_answers_who_names_it(engine, tiny_base_folder, adapters, tmp_path):
    new = {"field": shared.save_adapter(tiny_base_folder, tmp_path / "new", seed=78, rank=6)}
    loop = asyncio.get_running_loop()
    old_text, new_text = (reference(tiny_base_folder, a, "who answers", "field", 12) for a in (adapters, new))
    assert old_text != new_text

    async def said(versions):
        text, last = await collect(engine, ask("who answers", {"field": 1.0}, max_tokens=12, versions=versions))
        return text, last.versions["field"]

    await loop.run_in_executor(None, partial(engine.load_adapter, "field", read_adapter(new["field"], engine.base), "2", current=False))
    assert (engine.held("field"), engine.status().versions["field"]) == (("1", "2"), "1")
    assert [await said(v) for v in ({}, {"field": "2"}, {"field": "1"}, {"field": "9"})] == [
        (old_text, "1"),
        (new_text, "2"),
        (old_text, "1"),
        (old_text, "1"),
    ]
    # A row on the version that is let go of keeps it to its end; who names it later gets the current one.
    stream = engine.generate(ask("who answers", {"field": 1.0}, max_tokens=12, versions={"field": "1"}))
    first = await anext(stream)
    await loop.run_in_executor(None, engine.settle, "field", "2")
    assert first.text + "".join([e.text async for e in stream]) == old_text
    assert engine.held("field") == ("2",)
    assert await said({"field": "1"}) == (new_text, "2")
    with pytest.raises(UnknownModelError, match="version 1 of the persona 'field' is not held"):
        engine.settle("field", "1")


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


@pytest.mark.parametrize("run", [1, 2, 5])
async def test_no_run_of_tokens_comes_twice(engine, tiny_base_folder, run):
    """Against a loop that computes the whole sequence anew and looks through all of the answer for every token it might take."""
    base, text = engine.base, "paper jam paper jam"
    ids = encode_prompt(base.tokenizer, [Message("user", text)], document=None)
    model, answer = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval(), []
    while len(answer) < 40 and not set(answer) & base.stop_ids:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
        runs = [answer[i : i + run] for i in range(len(answer) - run + 1)]
        answer.append(next(t for t in logits.argsort(descending=True, stable=True).tolist() if [*answer, t][-run:] not in runs))
    want = base.tokenizer.decode([t for t in answer if t not in base.stop_ids], skip_special_tokens=True)
    got = await asyncio.gather(*(collect(engine, ask(text, max_tokens=40, no_repeat=n)) for n in (run, 0, run)))
    assert [got[0][0], got[2][0]] == [want, want]
    assert got[1][0] != want


async def test_stop_strings_cut_the_answer_and_are_not_sent(engine):
    whole, _ = await collect(engine, ask("hello", {"field": 1.0}, max_tokens=20))
    stop = whole[6:9]
    text, last = await collect(engine, ask("hello", {"field": 1.0}, max_tokens=20, stop=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"


async def test_a_fault_of_one_row_ends_that_row_only(engine, tiny_base_folder, adapters, monkeypatch):
    """One request must never take the others, or the replica, down with it."""
    choose = sampling.choose

    def failing(logits, request, random, *, so_far, stop_ids):
        if so_far == 3:
            raise RuntimeError("probability tensor contains inf")
        return choose(logits, request, random, so_far=so_far, stop_ids=stop_ids)

    monkeypatch.setattr(sampling, "choose", failing)
    bad = GenerateRequest("bad", (Message("user", "hot"),), {}, None, 30, temperature=1.0)
    other = asyncio.create_task(collect(engine, ask("stays", {"field": 1.0}, max_tokens=25)))
    with pytest.raises(WorkError, match="sampling failed"):
        await collect(engine, bad)
    assert (await other)[0] == reference(tiny_base_folder, adapters, "stays", "field", 25)
    assert engine.status().ready


async def test_a_prompt_on_which_the_model_fails_is_answered_with_an_error(engine, monkeypatch):
    """It once left its caller waiting for ever."""
    monkeypatch.setattr(engine._decoder, "prefill", lambda row, ids: 1 / 0)
    with pytest.raises(WorkError, match="the model failed on this prompt: ZeroDivisionError"):
        await asyncio.wait_for(collect(engine, ask("x", {"field": 1.0})), 10)
    assert engine.status().ready


async def test_the_coldest_temperatures_are_greedy(engine):
    cold, _ = await collect(engine, ask("hello", {"field": 1.0}, temperature=1e-40))
    greedy, _ = await collect(engine, ask("hello", {"field": 1.0}))
    assert cold == greedy


def test_text_that_may_begin_a_stop_string_waits():
    assert until_stop("answer EN", ("END",), flush=False) == ("answer ", "EN", False)
    assert until_stop("answer END and more", ("END",), flush=False) == ("answer ", "", True)
    assert until_stop("answer EN", ("END",), flush=True) == ("answer EN", "", False)
    assert until_stop("answer", (), flush=False) == ("answer", "", False)


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


async def test_log_probabilities_are_those_of_the_model(engine, tiny_base_folder):
    _, last = await collect(engine, ask("hello", max_tokens=1, logprobs=3))
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval()
    ids = torch.tensor([encode_prompt(engine.base.tokenizer, [Message("user", "hello")], document=None)])
    with torch.inference_mode():
        want = torch.log_softmax(model(input_ids=ids).logits[0, -1], -1).topk(3)
    (found,) = last.logprobs
    assert found.logprob == pytest.approx(float(want.values[0]), abs=1e-4)
    assert [p for _, p in found.top] == pytest.approx(want.values.tolist(), abs=1e-4)
    assert found.token == engine.base.tokenizer.decode([int(want.indices[0])])
    events = [e async for e in engine.generate(ask("hello", max_tokens=9, logprobs=0))]
    assert sum(len(e.logprobs) for e in events) == 9


async def test_biased_tokens_come_and_answers_do_not_end_too_early(engine):
    token = engine.base.tokenizer("z")["input_ids"][0]
    text, _ = await collect(engine, ask("hello", max_tokens=4, logit_bias={token: 100.0}))
    assert text == engine.base.tokenizer.decode([token]) * 4
    end = next(iter(engine.base.stop_ids))
    _, last = await collect(engine, ask("hello", max_tokens=9, logit_bias={end: 100.0}))
    assert (last.completion_tokens, last.finish_reason) == (1, "stop")
    _, last = await collect(engine, ask("hello", max_tokens=9, min_tokens=4, logit_bias={end: 100.0}))
    assert (last.completion_tokens, last.finish_reason) == (5, "stop")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"stop": ("x" * 201,)}, "stop: give at most 16 strings of 1 to 200 characters"),
        ({"stop": tuple("abcdefghijklmnopq")}, "stop: give at most 16"),
        ({"stop": ("",)}, "stop: give at most 16"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"min_tokens": 99}, "min_tokens between 0 and max_tokens"),
        ({"logprobs": 21}, "at most 20 likeliest"),
        ({"logit_bias": {10**6: 1.0}}, "1000000 is no token of this model"),
    ],
)
async def test_what_cannot_be_done_is_refused_and_the_batch_goes_on(engine, tiny_base_folder, adapters, asked, why):
    other = asyncio.create_task(collect(engine, ask("this one stays", {"field": 1.0}, max_tokens=25)))
    with pytest.raises(InputError, match=why):
        await collect(engine, ask("x", {"field": 1.0}, **asked))
    assert (await other)[0] == reference(tiny_base_folder, adapters, "this one stays", "field", 25)


async def test_an_adapter_that_does_not_fit_leaves_the_running_batch_as_it_is(engine, tiny_base_folder, adapters, tmp_path, tiny_tokenizer):
    other = shared.save_tiny("llama", tmp_path / "wide", tiny_tokenizer, hidden=64)
    wrong = shared.save_adapter(other, tmp_path / "wrong", seed=1)
    running = asyncio.create_task(collect(engine, ask("this one stays", {"field": 1.0}, max_tokens=25)))
    loop = asyncio.get_running_loop()
    with pytest.raises(AdapterError, match="made for another base"):
        await loop.run_in_executor(None, engine.load_adapter, "field", lambda: read_adapter(wrong, engine.base), "2")
    assert (await running)[0] == reference(tiny_base_folder, adapters, "this one stays", "field", 25)
    assert engine.status().versions["field"] == "1"


async def test_many_callers_for_one_version_read_it_once(engine, adapters):
    reads = []

    def read():
        reads.append(1)
        time.sleep(0.05)
        return read_adapter(adapters["admin"], engine.base)

    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(None, engine.load_adapter, "field", read, "9") for _ in range(4)))
    assert (len(reads), engine.status().versions["field"]) == (1, "9")


async def test_an_unloaded_persona_finishes_its_rows_and_takes_no_new_ones(engine, tiny_base_folder, adapters):
    stream = engine.generate(ask("long running", {"field": 1.0}, max_tokens=30))
    first = await anext(stream)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, engine.unload_adapter, "field")
    with pytest.raises(UnknownModelError, match="'field' is loaded"):
        await collect(engine, ask("x", {"field": 1.0}))
    rest = [e async for e in stream]
    assert first.text + "".join(e.text for e in rest) == reference(tiny_base_folder, adapters, "long running", "field", 30)
    with pytest.raises(UnknownModelError):
        await loop.run_in_executor(None, engine.unload_adapter, "field")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_a_merged_engine_answers_as_its_persona_and_swaps_between_answers(kind, tmp_path, tiny_tokenizer):
    """The running answer keeps its version to the end, the next one waits and has the new one, and the base's weights come back unchanged."""
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    old, new = ({"field": shared.save_adapter(folder, tmp_path / f"v{seed}", seed=seed)} for seed in (1, 2))
    base = load_base(str(folder), device="cpu")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    engine = PersonaEngine(base, merged="field")
    engine.load_adapter("field", read_adapter(old["field"], base), "1")
    first = engine.generate(ask("the first one", {"field": 1.0}, max_tokens=20))
    begun = await anext(first)
    swap = asyncio.get_running_loop().run_in_executor(None, engine.load_adapter, "field", read_adapter(new["field"], base), "2")
    await asyncio.sleep(0.02)
    second = asyncio.create_task(collect(engine, ask("the second one", {"field": 1.0}, max_tokens=20)))
    text = begun.text + "".join([e.text async for e in first])
    assert text == reference(folder, old, "the first one", "field", 20)
    await swap
    answer, last = await second
    assert (answer, last.versions) == (reference(folder, new, "the second one", "field", 20), {"field": "2"})
    with pytest.raises(UnknownModelError, match="merged into its base"):
        await collect(engine, ask("x"))
    await engine.close()
    engine.uninstall()
    for name, value in base.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


async def test_a_slow_reader_gets_everything_in_fewer_pieces(engine, tiny_base_folder, adapters):
    stream = engine.generate(ask("hello there", {"field": 1.0}, max_tokens=40, logprobs=0))
    events = [await anext(stream)]
    for _ in range(1000):
        if not engine.status().active_rows:
            break
        await asyncio.sleep(0.01)
    events += [e async for e in stream]
    assert len(events) <= 4
    assert "".join(e.text for e in events) == reference(tiny_base_folder, adapters, "hello there", "field", 40)
    assert sum(len(e.logprobs) for e in events) == events[-1].completion_tokens


async def test_a_further_persona_costs_its_factors_and_little_more(tiny_base_folder, tmp_path):
    """Sixteen personas: the bank holds each one's numbers once."""
    base = load_base(str(tiny_base_folder), device="cpu")
    engine = PersonaEngine(base, max_rows=2)
    folder = shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=1, rank=4)
    adapter = read_adapter(folder, base)
    for i in range(16):
        engine.load_adapter(f"p{i}", adapter, "1")
    held = sum(layer.A.numel() + layer.B.numel() for layer in engine._bank.layers.values())
    assert held == 16 * sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    await engine.close()
