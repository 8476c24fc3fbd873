"""Guessed tokens save steps and change no answer: against `generate`, against the same engine without guesses, and one token at a time."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from pathlib import Path

import pytest
import torch

from persona_models import fused
from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.decoder import TransformersDecoder
from persona_models.engine import PersonaEngine
from persona_models.fused import FusedDecoder
from persona_models.gated_lora import LoraBank
from persona_models.lookup import CUES, MOST_GUESSES, Lookup, Said, guesses
from persona_models.protocol import GenerateRequest, Message
from persona_models.row_cache import SPARE

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def ask(text: str, gate=None, **kwargs) -> GenerateRequest:
    return GenerateRequest("r", (Message("user", text),), gate or {}, **({"max_tokens": 60} | kwargs))


async def collect(engine, request, delay_s: float = 0.0):
    await asyncio.sleep(delay_s)
    events = [e async for e in engine.generate(request)]
    return "".join(e.text for e in events), events[-1], [p for e in events for p in e.logprobs]


def counted(engine) -> list[int]:
    """The widths of the engine's steps to come."""
    widths: list[int] = []
    step = engine._decoder.step

    def counting(tokens):
        widths.append(len(tokens[0]))
        return step(tokens)

    engine._decoder.step = counting
    return widths


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "neox", "phi", "gpt2"])
async def test_answers_of_fewer_steps_equal_generate(kind, tmp_path, tiny_tokenizer):
    """Models of random weights soon say the same over and over, so that most of their tokens can be guessed."""
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapters = {p: shared.save_adapter(folder, tmp_path / p, seed=i, rank=2 + i) for i, p in enumerate(("field", "admin"))}
    base = load_base(str(folder), device="cpu")
    engine = PersonaEngine(base, max_rows=3)
    for persona, path in adapters.items():
        engine.load_adapter(persona, read_adapter(path, base), "1")
    widths = counted(engine)
    names = ("field", "admin", None)
    jobs = [("printer " * (1 + 5 * i % 11) + str(i), names[i % 3], 50 + 7 * i) for i in range(6)]
    got = await asyncio.gather(*(collect(engine, ask(t, {p: 1.0} if p else {}, max_tokens=n), 0.004 * i) for i, (t, p, n) in enumerate(jobs)))
    await engine.close()
    engine.uninstall()
    for (text, persona, n), (answer, _, _) in zip(jobs, got, strict=True):
        assert answer == shared.generated(folder, adapters.get(persona), [Message("user", text)], n), (text, persona)
    assert max(widths) > 1
    assert sum(widths) > len(widths) * 1.5


async def test_every_rule_of_a_request_holds_for_guessed_tokens(tiny_base_folder):
    """Seeds, stop strings, runs that must not come twice, least lengths, biases, log-probabilities: as without guesses."""
    base = load_base(str(tiny_base_folder), device="cpu")
    plain = {}
    for guess in (False, True):
        engine = PersonaEngine(base, guess=guess)
        widths = counted(engine)
        looping, _, _ = await collect(engine, ask("vpn"))
        rules = [
            {},
            {"temperature": 0.7, "seed": 3},
            {"temperature": 1.5, "seed": 4, "top_p": 0.8, "top_k": 5},
            {"stop": (looping[len(looping) // 2 :][:4],)},
            {"no_repeat": 4},
            {"no_repeat": 1, "max_tokens": 20},
            {"min_tokens": 30, "logit_bias": {base.tokenizer.eos_token_id: 5.0}},
            {"logprobs": 2},
        ]
        found = [await collect(engine, ask("vpn", **rule)) for rule in rules]
        found += await asyncio.gather(*(collect(engine, ask("vpn", **rule)) for rule in rules))
        said = [(text, last.completion_tokens, last.finish_reason, [p.token for p in logprobs]) for text, last, logprobs in found]
        plain[guess] = said, [p.logprob for _, _, logprobs in found for p in logprobs]
        assert (max(widths) > 1) == guess
        await engine.close()
        engine.uninstall()
    assert plain[True][0] == plain[False][0]
    assert plain[True][1] == pytest.approx(plain[False][1], abs=1e-4)


async def test_an_answer_may_be_guessed_up_to_the_end_of_the_context(tmp_path, tiny_tokenizer):
    """Its last steps try places that the model's table of positions does not have."""
    folder = shared.save_tiny("gpt2", tmp_path / "base", tiny_tokenizer)
    base = load_base(str(folder), device="cpu")
    base.stop_ids = frozenset()
    engine = PersonaEngine(base)
    widths = counted(engine)
    _, last, _ = await collect(engine, ask("vpn", max_tokens=10_000))
    assert last.prompt_tokens + last.completion_tokens == base.context_tokens
    assert max(widths) > 1
    await engine.close()


@pytest.mark.parametrize(("heads", "many"), [(1, 64), (2, 64), (4, 64), (1, 1), (2, 1), (4, 1)])
@torch.inference_mode()
def test_several_tokens_in_a_step_are_as_one_after_the_other(heads, many, tmp_path, tiny_tokenizer, monkeypatch):
    """Both decoders, rows of different lengths and adapters, of which some tokens are taken back; scores as of few rows and as of many."""
    monkeypatch.setattr(fused, "MANY", many)
    folder = shared.save_tiny("llama", tmp_path / "base", tiny_tokenizer, num_key_value_heads=heads)
    base = load_base(str(folder), device="cpu")
    bank = LoraBank(base.model)
    for i, (name, targets) in enumerate({"all": "all-linear", "some": ["o_proj", "down_proj"]}.items()):
        adapter = read_adapter(shared.save_adapter(folder, tmp_path / name, seed=i, rank=2 + i, target_modules=targets), base)
        bank.load(name, adapter.rank, adapter.factors)
    gates = ({"all": 1.0}, {}, {"some": 0.5, "all": 0.5})
    texts = [list(range(5, 5 + n)) for n in (40, 3, 17)]
    for kind in (FusedDecoder, TransformersDecoder):
        one, several = kind(base.model, bank, 4, 128), kind(base.model, bank, 4, 128)
        for row, (gate, text) in enumerate(zip(gates, texts, strict=True)):
            for decoder in (one, several):
                decoder.open(row, gate)
                decoder.prefill(row, text)
        for width, kept in ((4, (4, 1, 2)), (2, (1, 2, 2)), (7, (7, 7, 7)), (1, (1, 1, 1))):
            tokens = [[20 + row + i for i in range(width)] for row in range(3)]
            lengths = list(several.cache.lengths[:3])
            got = several.step(tokens)
            assert got.shape[:2] == (3, width)
            for row, n in enumerate(kept):
                several.cache.cut(row, lengths[row] + n)
            # One after the other: rows that keep fewer tokens are fed something, and it is taken back.
            for i in range(width):
                want = one.step([[t[i]] for t in tokens])
                for row, n in enumerate(kept):
                    if i < n:
                        torch.testing.assert_close(got[row, i], want[row, 0], atol=2e-5, rtol=1e-4)
                    else:
                        one.cache.cut(row, lengths[row] + n)


def first_successors(tokens: list[int], others: list[list[int]], most: int, prompt: int = 3) -> list[int]:
    """The slow, obvious way: look through all that was said for the first place where the last tokens stood, then through others' answers for the last."""
    for n in CUES:
        for at in range(n, len(tokens)):
            if tokens[at - n : at] == tokens[-n:]:
                return tokens[at : at + most]
        for other in reversed(others):
            for at in range(len(other) - 1, max(n, prompt) - 1, -1):
                if other[at - n : at] == tokens[-n:]:
                    return other[at : at + most]
    return []


def test_a_guess_is_what_followed_the_last_tokens_where_they_first_stood():
    pick = random.Random(0)
    for size in (2, 5, 40):
        tokens = [pick.randrange(size) for _ in range(30)]
        lookup = Lookup(tokens, Said())
        for _ in range(60):
            assert lookup.guess(5) == first_successors(tokens, [], 5)
            tokens.append(pick.randrange(size))
            lookup.extend(tokens[-1:])
    assert Lookup([], Said()).guess(3) == Lookup([1, 2, 3], Said()).guess(3) == []


def test_what_a_row_does_not_know_is_guessed_from_what_others_said_last():
    pick = random.Random(1)
    for size in (5, 12):
        said, others = Said(), []
        for _ in range(20):
            prompt = [pick.randrange(size) for _ in range(3)]
            lookup, tokens = Lookup(prompt, said), list(prompt)
            for _ in range(12):
                assert lookup.guess(4) == first_successors(tokens, others, 4)
                tokens.append(pick.randrange(size))
                lookup.extend(tokens[-1:])
            others.append(tokens)


def test_nothing_of_a_prompt_is_ever_a_guess_for_others():
    said = Said()
    Lookup([1, 2, 3, 4, 5], said).extend([6])
    assert Lookup([9, 1, 2, 3], said).guess(3) == []
    assert Lookup([9, 4, 5], said).guess(3) == [6]


def test_the_answers_begun_longest_ago_are_forgotten_first_and_whole():
    said = Said(tokens=6)
    Lookup([1, 2], said).extend([3, 4, 5])
    Lookup([11, 12], said).extend([13, 14])
    assert Lookup([1, 2], said).guess(9) == [3, 4, 5]
    last = Lookup([3, 4], said)
    last.extend([6])
    assert Lookup([3, 4], said).guess(9) == [6], "said last"
    last.extend([7])
    assert Lookup([1, 2], said).guess(9) == Lookup([4, 5], said).guess(9) == []
    assert Lookup([3, 4], said).guess(9) == [6, 7]
    assert Lookup([11, 12], said).guess(9) == [13, 14]
    last.extend(range(20, 30))
    assert len(said._after) == len(said._answers) == 0, "an answer longer than the room is not kept either"
    Lookup([1, 2], said).extend([3])
    assert Lookup([1, 2], said).guess(9) == [3]
    nothing = Said(0)
    Lookup([1, 2], nothing).extend([3, 4])
    assert Lookup([1, 2], nothing).guess(9) == []
    assert not nothing._after


def test_the_cache_has_room_for_all_guesses():
    assert max(most for _, most in MOST_GUESSES) < SPARE


def test_the_more_of_its_guesses_come_the_more_a_row_guesses():
    tokens = list(range(40)) * 2
    lookup = Lookup(tokens, Said())
    first = len(lookup.guess(99))
    lookup.judge(first, 0)
    assert 0 < len(lookup.guess(99)) < first
    for _ in range(20):
        lookup.judge(9, 9)
    sure = len(lookup.guess(99))
    assert sure > 2 * first
    # A tried token that nobody guessed, to fill a step, tells nothing.
    lookup.guess(2)
    lookup.judge(9, 2)
    assert len(lookup.guess(99)) >= sure


def test_who_is_guessed_wrong_is_left_alone_for_a_while():
    lookup = Lookup([1, 2, 3, 1, 2], Said())
    tries = 0
    for _ in range(200):
        guess = lookup.guess(2)
        tries += bool(guess)
        lookup.judge(2, 0)
    assert 5 < tries < 60


def test_a_step_tries_what_most_rows_have():
    def rows(*tokens):
        return [Lookup(t, Said()) for t in tokens]

    known, unknown = [*range(30), 1, 2], [1, 2, 3, 4]
    alone = guesses(rows(known))[0]
    assert alone == list(range(3, 3 + len(alone)))
    assert 5 < len(alone) <= 15
    assert guesses(rows(known, known, unknown)) == [known[3:12], known[3:12], [0] * 9]
    assert guesses(rows(known, unknown)) == [alone[:15], [0] * len(alone)]
    assert guesses(rows(known, unknown, unknown)) == [[], [], []]
    assert guesses(rows(*[known] * 16)) == [[3, 4, 5, 6, 7, 8, 9]] * 16
    assert guesses(rows(*[known] * 25)) == [[3, 4, 5, 6, 7]] * 25
    assert guesses(rows(unknown)) == [[]]


async def test_the_second_of_two_alike_answers_takes_fewer_steps(tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    base.stop_ids = frozenset()
    engine = PersonaEngine(base, prefix_mb=0)
    widths = counted(engine)
    first, _, _ = await collect(engine, ask("vpn"))
    steps = len(widths)
    second, _, _ = await collect(engine, ask("vpn"))
    await engine.close()
    assert first == second
    assert len(widths) - steps < steps / 2
