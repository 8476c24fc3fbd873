"""What is said behind an answer: told apart by words, on texts held out, and read from the artefact as it was written."""

from __future__ import annotations

import hashlib
import json

import pytest

from persona_models.errors import ConfigError
from pipelines.compose import CORPUS
from pipelines.router_corpus import read_router_corpus
from pipelines.train_follow_ups import fit_follow_ups
from router.artefact import MANIFEST
from router.follow_up import FILE, KINDS, FollowUps, terms
from router.loading import SHIPPED

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
# In no corpus; the settings of the fit were chosen with some of these in view, so they guard what was reached and measure nothing.
THANKS = [
    "it worked, thanks",
    "perfect, that did it!",
    "ok works, cheers",
    "yes that fixed it",
    "that was it. have a nice day",
    "Great, all fine now",
]
STILL = ["did not help", "no luck, same thing", "it still fails", "same error message again", "tried twice. nothing.", "great, now nothing works"]
REQUESTS = ["Now Outlook does not open", "thanks, and now the printer prints blank pages", "order a keyboard please", "I forgot my password"]


def test_the_shipped_model_tells_what_it_never_saw_apart():
    shipped = FollowUps.load(SHIPPED)
    assert [t for t in THANKS if not shipped.says_thanks(t)] == []
    assert [t for t in (*STILL, *REQUESTS) if shipped.says_thanks(t)] == []
    assert [t for t in (*THANKS, *STILL) if not shipped.goes_on(t)] == []
    assert [t for t in REQUESTS if shipped.goes_on(t)] == []
    for text in (*THANKS, "", "\U0001f600", "a" * 5000):
        probabilities = shipped.probabilities(text)
        assert tuple(probabilities) == KINDS
        assert sum(probabilities.values()) == pytest.approx(1)


def test_it_is_fitted_from_the_corpus_and_measured_on_what_is_held_out():
    data = read_router_corpus(CORPUS, PERSONAS)
    made, figures = fit_follow_ups(data.follow_ups, [r.text for r in data.prompts[::4]])
    assert figures["still_taken_for_thanks"] <= 0.03
    assert figures["requests_taken_for_thanks"] <= 0.01
    assert figures["thanks_known"] >= 0.5
    assert figures["turns_known"] >= 0.8
    assert made.says_thanks("it worked, thanks")


def test_too_few_turns_make_no_model():
    assert fit_follow_ups({}, ["my vpn drops"]) == (None, {})
    assert fit_follow_ups({"thanks": ["thanks"] * 30, "still": ["no"] * 3}, ["my vpn drops"]) == (None, {})


def test_it_comes_back_as_it_was_written(tmp_path):
    made = FollowUps({"thanks": [1.0, -1.0, 0.5], "caf\u00e9 now": [0.0, 2.0, 0.0]}, [0.1, 0.2, 0.3], 0.75)
    data = made.save(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {FILE: hashlib.sha256(data).hexdigest()}}))
    again = FollowUps.load(tmp_path)
    assert (again.weights, again.bias, again.sure) == (made.weights, made.bias, made.sure)
    # By hand: "thanks" is a word, the first and the last of its turn, and only the word has a weight.
    assert terms("Thanks!") == ["thanks", "length 0", "^thanks", "thanks$", "!"]
    odds = [2.718281828**s for s in (1.1, -0.8, 0.8)]
    assert again.probabilities("Thanks!")["thanks"] == pytest.approx(odds[0] / sum(odds), rel=1e-6)
    (tmp_path / FILE).write_bytes(data + b" ")
    with pytest.raises(ConfigError, match="run `deskroute retrain router`"):
        FollowUps.load(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ConfigError, match="is damaged"):
        FollowUps.load(tmp_path)
    (tmp_path / FILE).unlink()
    assert FollowUps.load(tmp_path) is None
