"""Messages with two requests: where cuts may be, that the fast evidence is the classifier's own, and that nothing is lost in answering both."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest

from persona_models.errors import ConfigError
from persona_models.protocol import TokenEvent
from router.classifier import PersonaClassifier
from router.loading import SHIPPED
from router.policy import Route, together
from router.query import Query, words_of
from router.segment import BEGINS, FEATURES, Evidence, Segmenter, cuts, features, pieces_of, words_around
from router.stream import in_turn

TWO = "The crane techs' tablets lost the offline manuals out in the vans. Also, the payroll clerk cannot print the wage slips for Friday."
ONE = "Excel crashes when I open the big model. It worked yesterday, and nothing has changed since."


@pytest.fixture(scope="module")
def classifier() -> PersonaClassifier:
    return PersonaClassifier.load(SHIPPED)


@pytest.fixture(scope="module")
def segmenter(classifier) -> Segmenter:
    found = Segmenter.from_facts(classifier.segments)
    assert found
    return found


def test_cuts_stand_where_a_request_may_begin():
    found = {(TWO[c.start :].split()[0], c.kind) for c in cuts(TWO)}
    assert ("Also,", "sentence") in found
    assert ("the", "comma") in found
    assert cuts("printer jammed") == []
    # Longer than what is scored of a text.
    assert cuts("The tablet is dead. " * 300) == []
    assert [c.kind for c in cuts("the printer is jammed\n\nmy badge does not open the door")] == ["line"]
    # A cut never leaves a side of a word or two.
    assert cuts("Hello. My printer is jammed again today") == []


def test_runs_of_spaces_are_looked_through_once():
    """Each of a few thousand spaces would otherwise look through the rest of them: seconds for one message. Counted in steps, not in time."""
    short, long = (f"my vpn is dead{' ' * n}and the payroll printer too" for n in (1, 3900))
    assert [(c.kind, c.start - len(long)) for c in cuts(long)] == [(c.kind, c.start - len(short)) for c in cuts(short)]
    assert len(re.findall(BEGINS, long)) == len(re.findall(BEGINS, short)) == short.count(" ")


def test_evidence_is_what_the_classifier_says_of_the_text(classifier):
    """Without repeated words and known pairs across the pieces, a run of pieces scores as its text does."""
    pieces = ["scanner dead", "payroll stuck", "tablet frozen"]
    evidence = Evidence(classifier, [p.split() for p in pieces])
    for first, last in ((0, 1), (1, 3), (0, 3)):
        text = " ".join(pieces[first:last])
        assert not {"dead payroll", "stuck tablet"} & set(classifier.space.text.columns)
        assert evidence.raw(first, last)[:-1] == pytest.approx(classifier.raw(*classifier.space.row(Query(text))), abs=2e-3)


def test_all_sides_at_once_are_the_sides_one_by_one(classifier):
    pieces = ["The tablets in the vans ", "lost their manuals. ", "Also our payroll clerk ", "cannot print, zzyzx zzyzx"]
    evidence = Evidence(classifier, [words_of(p) for p in pieces])
    heads, tails = evidence.sides()
    assert heads == pytest.approx(np.stack([evidence.raw(0, i) for i in (1, 2, 3)]))
    assert tails == pytest.approx(np.stack([evidence.raw(i, 4) for i in (1, 2, 3)]))


def test_two_requests_are_found_in_order_and_one_is_left_whole(classifier, segmenter):
    head, tail = TWO.split(" Also, ")
    assert segmenter.split(classifier, TWO) == [head, f"Also, {tail}"]
    joined = "my vpn drops at the customer's site and also our payroll clerk cannot print the wage slips"
    assert segmenter.split(classifier, joined) == ["my vpn drops at the customer's site", "also our payroll clerk cannot print the wage slips"]
    assert segmenter.split(classifier, ONE) == [ONE]
    assert segmenter.split(classifier, "") == [""]


def test_every_feature_has_a_name_and_no_value_is_missing(classifier):
    rows = features(classifier, TWO, cuts(TWO), pieces_of(TWO, cuts(TWO)))
    assert rows.shape == (len(cuts(TWO)), len(FEATURES))
    assert np.isfinite(rows).all()


def test_the_words_around_a_cut_are_those_of_the_text():
    text = "The scanner is dead. Also, the new girl has no login; nobody knows why"
    places = cuts(text)
    pieces = pieces_of(text, places)
    assert [w for piece in pieces for w in piece] == words_of(text)
    at = next(i for i, c in enumerate(places) if c.kind == "sentence")
    around = words_around(pieces)[at]
    assert {"f:also", "f:also the", "f:also the new", "s:login", "s:new girl", "h:dead", "h:is dead"} <= around
    assert "s:knows" not in around  # the ninth word after it
    assert "h:the" not in around  # the fourth before it


def test_damaged_numbers_are_refused():
    assert Segmenter.from_facts(None) is None
    for facts in ({}, {"weights": [1.0], "bias": 0, "threshold": 0.5, "words": {}}, {"weights": "x", "bias": 0, "threshold": 0, "words": {}}):
        with pytest.raises(ConfigError, match="deskroute retrain router"):
            Segmenter.from_facts(facts)


def test_a_route_for_several_requests_names_their_personas():
    route = together([Route("persona", "field", 0.9), Route("persona", "admin", 0.7)])
    assert (route.decision, route.persona, route.confidence, route.mix) == ("mix", "field", 0.7, {"field": 0.5, "admin": 0.5})
    assert route.reason == "2 requests: field, then admin"


async def said(words, version, reason="stop", closed=None):
    try:
        for n, word in enumerate(words, 1):
            await asyncio.sleep(0)
            yield TokenEvent(word, n, 7, reason if n == len(words) else None, {version: "1"})
    finally:
        if closed is not None:
            closed.append(version)


async def test_answers_are_read_in_turn_and_counted_together():
    events = [e async for e in in_turn([said(["a", "b"], "field", "length"), said(["c", "d", "e"], "admin")])]
    assert "".join(e.text for e in events) == "ab\n\ncde"
    assert [e.finish_reason for e in events] == [None] * 4 + ["length"]
    assert events[-1].completion_tokens == 5
    assert {e.prompt_tokens for e in events} == {14}
    assert all(e.versions == {"field": "1", "admin": "1"} for e in events)


async def test_an_error_in_one_answer_ends_both_and_closing_cancels_them():
    async def broken():
        yield TokenEvent("x", 1, 1, None, {})
        raise ConfigError("no")

    closed: list = []
    with pytest.raises(ConfigError):
        [e async for e in in_turn([said(["a"], "field", closed=closed), broken()])]
    stream = in_turn([said(["a"] * 50, "field", closed=closed), said(["b"] * 50, "admin", closed=closed)])
    await anext(stream)
    await stream.aclose()
    assert sorted(closed) == ["admin", "field", "field"]
