"""Messages of one sender with two matters: both are found where they are two, through the model that ships, its artefact and the desk."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from persona_models.errors import ConfigError
from persona_models.protocol import Message
from pipelines.compose import CORPUS
from pipelines.local import local_desk
from pipelines.router_corpus import RouterData, Topical, read_router_corpus
from pipelines.train_matters import fit_matters, measure_matters
from router.config import load_config
from router.loading import SHIPPED
from router.matters import FEATURES, FILE, Matters, pairs_in
from router.query import Profile
from router.segment import cuts, halves

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
TWO = {
    "My VPN keeps dropping at home. Also, the laptop battery is empty after an hour.": ["vpn", "battery"],
    "can't connect to the office wifi, and my headset isn't recognised in Teams": ["wifi", "headset"],
    "Forgot my Windows password\nPlease add me to the shared mailbox of purchasing": ["password_reset", "shared_mailbox"],
}
MORE = {
    "1. vpn drops\n2. printer offline\n3. need visio": ["vpn", "printer", "software_request"],
    "Headset isn't recognized and my camera stays black in calls. Oh and the captions are in French.": [
        "headset",
        "video_meeting",
        "translation_captions",
    ],
}
ONE = (
    "My VPN keeps dropping at home. I restarted the laptop and the router, and it still drops after a minute.",
    "Outlook hangs whenever I send a mail. It worked yesterday.",
    "vpn drops",
    "",
)


@pytest.fixture(scope="module")
def desk():
    return local_desk(load_config(), models=False)


def planned(desk, *said: str, model: str | None = None):
    roles = ("user", "assistant")
    return desk.plan([Message(roles[i % 2], text) for i, text in enumerate(said)], Profile(), model)


@pytest.mark.parametrize("text", TWO | MORE)
def test_both_matters_get_their_article_in_order(desk, text):
    plan = planned(desk, text)
    topics = (TWO | MORE)[text]
    assert [s.id for s in plan.block.sources] == topics
    assert len(plan.parts) == len(plan.block.segments) == len(topics)
    # Nothing of the message is lost but what joins the two.
    left = text
    for segment in plan.block.segments:
        assert segment.text in left
        left = left.replace(segment.text, "")
    assert len(left.split()) < len(topics)
    assert [part.messages[-1].content for part in plan.parts] == [s.text for s in plan.block.segments]


@pytest.mark.parametrize("text", ONE)
def test_one_matter_stays_whole(desk, text):
    assert desk.matters.split(desk.knowledge, desk.segmenter, text) == []


def test_a_named_persona_and_a_turn_that_goes_on_are_not_cut(desk):
    text = next(iter(TWO))
    assert len(planned(desk, text, model="field").parts) == 1
    assert len(planned(desk, "my vpn drops", "Restart it.", "no, it still drops. And the same error as before, also at home.").parts) == 1
    assert len(planned(desk, "where is the canteen app?", "Under Apps.", text).parts) == 2


def test_only_cuts_with_different_articles_are_looked_at(desk):
    text = next(iter(TWO))
    for pair in pairs_in(desk.knowledge, desk.segmenter, text):
        assert pair.cut in cuts(text)
        assert pair.first == desk.knowledge.match(text[: pair.cut.end], 1)[0].article.id
        assert pair.second == desk.knowledge.match(text[pair.cut.start :], 1)[0].article.id
        assert pair.first != pair.second
        assert len(pair.features) == len(FEATURES)
        assert np.isfinite(pair.features).all()
    assert pairs_in(desk.knowledge, desk.segmenter, "\u00e9 " * 60) == []


def test_cuts_that_cannot_be_one_are_not_looked_up_and_none_is_missed(desk, monkeypatch):
    """Against the obvious way: every cut looked up, then the best one asked whether it is enough."""
    data = read_router_corpus(CORPUS, PERSONAS)
    texts = [m.text for m in data.matters[::4]] + [r.text for r in data.prompts[::700]]
    slow = []
    for text in texts:
        found = desk.matters.best(pairs_in(desk.knowledge, desk.segmenter, text))
        slow.append(halves(text, found.cut) if found else ())
    looked, best = [], desk.knowledge.best
    monkeypatch.setattr(desk.knowledge, "best", lambda text: looked.append(text) or best(text))
    for text, pieces in zip(texts, slow, strict=True):
        fast = desk.matters.split(desk.knowledge, desk.segmenter, text)
        assert bool(fast) == bool(pieces)
        if len(fast) == 2:
            assert tuple(fast) == pieces
    fast_looks = len(looked)
    for text in texts:
        pairs_in(desk.knowledge, desk.segmenter, text)
    assert fast_looks < len(looked) - fast_looks


def test_it_is_fitted_from_the_corpus(desk):
    """On the messages with one matter or two and some of the prompts: what it has seen it tells apart, and prompts stay whole."""
    data = read_router_corpus(CORPUS, PERSONAS)
    data = RouterData(data.articles, {}, data.prompts[::20], (), (), (), matters=data.matters)
    made, figures = fit_matters(desk.knowledge, desk.segmenter, data)
    assert figures.keys() == {"one_matter_split"}
    assert figures["one_matter_split"] <= 0.05
    seen = measure_matters(made, desk.knowledge, desk.segmenter, data.matters)
    assert seen["two_matters_found"] >= 0.6
    assert seen["one_matter_split"] <= 0.1
    assert fit_matters(desk.knowledge, None, data) == (None, {})
    few = RouterData(data.articles, {}, data.prompts, (), (), (), matters=(Topical("a. b", ("vpn", "wifi"), "x"),))
    assert fit_matters(desk.knowledge, desk.segmenter, few) == (None, {})


def test_an_artefact_comes_back_as_it_was_and_a_damaged_one_is_named(tmp_path):
    made = Matters(np.linspace(-2, 2, len(FEATURES)), 0.25)
    made.save(tmp_path)
    again = Matters.load(tmp_path)
    np.testing.assert_allclose(again.weights, made.weights, atol=1e-4)
    assert again.bias == 0.25
    facts = json.loads((tmp_path / FILE).read_text())
    del facts["weights"]["cue"]
    (tmp_path / FILE).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"damaged .*retrain router"):
        Matters.load(tmp_path)
    assert Matters.load(tmp_path / "none") is None
    with pytest.raises(ConfigError, match="are wanted"):
        Matters(np.zeros(3), 0.0)


def test_a_router_without_it_answers_a_message_whole(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "router")
    (tmp_path / "router" / FILE).unlink()
    plan = planned(local_desk(load_config(router={"artefact": str(tmp_path / "router")}), models=False), next(iter(TWO)))
    assert len(plan.parts) == 1
