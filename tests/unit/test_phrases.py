"""Phrases that answers share: chosen against a slow reading of all answers, found against a plain dictionary, and of use to the engine."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from persona_models import adapters
from persona_models.adapters import PHRASES, read_adapter
from persona_models.base_model import load_base
from persona_models.engine import PersonaEngine
from persona_models.errors import AdapterError
from persona_models.lookup import CUES, Lookup, Phrases, Said
from persona_models.protocol import GenerateRequest, Message
from pipelines.phrases import LEAST_ANSWERS, RUN, often_said

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def runs(tokens) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)}


def answers(seed: int, n: int = 40) -> list[list[int]]:
    """Three sentences of ten in another order each time, and words of one's own between them."""
    pick = random.Random(seed)
    sentences = [[100 * s + i for i in range(pick.randrange(3, 12))] for s in range(10)]
    return [[t for s in pick.sample(sentences, 3) for t in [*s, *(pick.randrange(5000, 9000) for _ in range(pick.randrange(3)))]] for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_phrases_are_all_that_enough_answers_say(seed):
    said = answers(seed)
    times: dict[tuple[int, ...], int] = {}
    for answer in said:
        for run in runs(answer):
            times[run] = times.get(run, 0) + 1
    phrases = often_said(said)
    found = set().union(*map(runs, phrases))
    assert found == {run for run, n in times.items() if n >= LEAST_ANSWERS}
    for phrase in phrases:
        assert sum(phrase in {tuple(a[i : i + len(phrase)]) for i in range(len(a))} for a in said) >= LEAST_ANSWERS, "whole"
    assert len(phrases) == len(set(phrases))


def test_what_few_answers_say_stays_with_them():
    own = list(range(20_000, 20_020))
    assert often_said([own] * (LEAST_ANSWERS - 1) + answers(0)) == often_said(answers(0))
    assert tuple(own) in often_said([own] * LEAST_ANSWERS + answers(0))
    assert often_said([own * 9, *answers(0)]) == often_said(answers(0)), "however often one answer says it"
    # Everyone's words in an order that is somebody's own: cut where it becomes so.
    first, second = list(range(30_000, 30_008)), list(range(40_000, 40_008))
    once = [*first, *second, *first]
    assert set(often_said([first] * 3 + [second] * 3 + [once])) == {tuple(first), tuple(second)}
    digits = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    shared_ends = [[70, *digits[i : i + RUN], 70] for i in range(len(digits) - RUN + 1)]
    assert max(map(len, often_said([digits] + shared_ends * 2))) == RUN
    assert often_said([]) == often_said([[1, 2]]) == often_said([[1] * 9]) == []


def test_no_more_is_kept_than_was_asked_for_and_the_most_useful_first():
    said = [*answers(1, 60), *answers(2, 30)]
    everything = often_said(said)
    assert sum(map(len, everything)) > 90
    for most in (0, 8, 40, 60, 90):
        kept = often_said(said, most)
        assert sum(map(len, kept)) <= most
        assert set().union(*map(runs, kept)) <= set().union(*map(runs, everything))
    assert often_said(said, 60)
    often, seldom = list(range(10)), list(range(50, 60))
    assert often_said([often] * 9 + [seldom] * 3) == [tuple(often), tuple(seldom)]


def test_a_cue_is_found_in_the_first_phrase_that_says_it():
    pick = random.Random(3)
    phrases = [[pick.randrange(12) for _ in range(pick.randrange(1, 9))] for _ in range(40)]
    found = Phrases(phrases)
    first: dict[tuple[int, ...], list[int]] = {}
    for phrase in phrases:
        for n in CUES:
            for end in range(n, len(phrase)):
                first.setdefault(tuple(phrase[end - n : end]), phrase[end:])
    for n in CUES:
        for _ in range(2000):
            cue = tuple(pick.randrange(13) for _ in range(n))
            got = found.find(cue)
            assert (got and list(got[0][got[1] :])) == first.get(cue)
    assert Phrases().find((1, 2)) is None
    high = 2**21 - 1
    tokens, at = Phrases([[high, high - 1, high, 7]]).find((high, high - 1, high))
    assert tokens[at] == 7


def test_phrases_come_after_the_prompt_and_before_others_answers():
    said = Said()
    Lookup([9], said).extend([1, 2, 3, 4])
    phrases = [Phrases([[1, 2, 3, 5, 6]]), Phrases([[1, 2, 3, 7]])]

    def knowing(prompt: list[int]) -> Lookup:
        lookup = Lookup(prompt, said)
        lookup.know(phrases)
        return lookup

    assert Lookup([1, 2, 3], said).guess(3) == [4]
    assert knowing([1, 2, 3]).guess(3) == [5, 6]
    assert knowing([1, 2, 3, 8, 1, 2, 3]).guess(2) == [8, 1]
    assert knowing([0, 1, 2]).guess(1) == [3]


@pytest.mark.parametrize("merged", [None, "field"])
async def test_an_answer_that_its_persona_was_known_to_give_takes_fewer_steps_and_is_the_same(merged, tiny_base_folder, tmp_path):
    base = load_base(str(tiny_base_folder), device="cpu")
    base.stop_ids = frozenset()
    plain = read_adapter(shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=3), base)
    request = GenerateRequest("r", (Message("user", "the printer smokes"),), {"field": 1.0}, max_tokens=60, temperature=2.0, seed=5)
    engine = PersonaEngine(base, merged=merged, said=Said(0))
    take, steps, tokens = engine._take, [], []

    def taken(row, *args):
        steps.append(len(row.tokens))
        tokens[:] = row.tokens
        return take(row, *args)

    engine._take = taken
    found = []
    for phrases in ((), None, ()):
        # What is sampled at this temperature comes no second time by itself.
        known = plain if phrases == () else replace(plain, phrases=Phrases([tokens]))
        engine.load_adapter("field", known, str(len(found)))
        steps.clear()
        text = "".join([e.text async for e in engine.generate(request)])
        found.append((text, len(steps)))
    await engine.close()
    assert found[0] == found[2]
    assert found[1][0] == found[0][0]
    assert found[1][1] < found[0][1] / 2


async def test_a_version_answers_with_its_own_phrases_and_takes_them_along(tiny_base_folder, tmp_path):
    base = load_base(str(tiny_base_folder), device="cpu")
    plain = read_adapter(shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=3), base)
    engine = PersonaEngine(base)

    def known(**versions: str) -> list[int]:
        _, gate = engine._slots.take({"field": 1.0}, versions)
        found = [phrases.find((1, 2))[0][2] for phrases in engine._slots.phrases(gate)]
        engine._slots.give_back(gate)
        return found

    for version, token in (("1", 10), ("2", 20)):
        engine.load_adapter("field", replace(plain, phrases=Phrases([(1, 2, token)])), version, current=version == "1")
    assert (known(), known(field="2"), known(field="gone")) == ([10], [20], [10])
    engine.settle("field", "1")
    assert (known(), known(field="2")) == ([10], [10])
    engine.load_adapter("field", replace(plain, phrases=Phrases([(1, 2, 30)])), "3")
    assert (known(), known(field="1")) == ([30], [30])
    engine.unload_adapter("field")
    assert not engine._slots._phrases
    await engine.close()


def test_phrases_beside_an_adapter_are_read_as_tokens(tiny_base_folder, tmp_path, monkeypatch):
    base = load_base(str(tiny_base_folder), device="cpu")
    folder = shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=1)
    assert not read_adapter(folder, base).phrases._phrases
    texts = ["Please restart it.\n", " and sign in again"]
    (folder / PHRASES).write_text(json.dumps(texts))
    got = read_adapter(folder, base).phrases._phrases
    assert [base.tokenizer.decode(phrase) for phrase in got] == texts
    monkeypatch.setattr(adapters, "MOST_PHRASE_TOKENS", len(got[0]) + 1)
    assert read_adapter(folder, base).phrases._phrases == got[:1]
    for broken in (b"{", b'{"a": 1}', b"[1]", b"\xff", b'["\\ud800"]', b"[" * 100_000):
        (folder / PHRASES).write_bytes(broken)
        with pytest.raises(AdapterError, match=r"phrases\.json is no list of texts .*retrain the persona, or delete the file"):
            read_adapter(folder, base)
