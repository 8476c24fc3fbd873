"""The store: what is written, what is not, and what becomes of it in training."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_models.errors import ConfigError, UnknownRequestError
from persona_models.protocol import Message
from pipelines.dataset import feedback_samples
from router.article import Article, Step
from router.feedback import FeedbackStore, open_for_reading
from router.knowledge import KnowledgeBase
from router.schema import DeskrouteBlock


def block(request_id: str, persona="field") -> DeskrouteBlock:
    return DeskrouteBlock(
        request_id=request_id, decision="persona", persona=persona, confidence=0.9, scores={"field": 0.9}, in_domain=1.0, mix={}, segments=[],
        reasons=[], sources=[], versions={}, router_version="1",
    )  # fmt: skip


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'deep' / 'f.db'}"


def put(store, request_id, question, answer, **kwargs):
    store.add_route(block(request_id, **kwargs), user="u", profile={"title": "Driver"})
    store.remember(request_id, [Message("user", question)], answer)


def test_a_rating_brings_its_text_and_survives_a_restart(url):
    store = FeedbackStore(url)
    put(store, "a", "vpn drops", "restart it")
    assert store.rate("a", "up", comment="nice") is True
    store.close()
    (rating,) = FeedbackStore(url).ratings()
    assert (rating.rating, rating.comment, rating.persona, rating.answer) == ("up", "nice", "field", "restart it")
    assert rating.messages == (Message("user", "vpn drops"),)


def test_many_threads_write_to_a_store_in_memory():
    """Its one connection is used in turn."""
    store = FeedbackStore("sqlite://")

    def answer(i: int) -> None:
        put(store, f"r{i}", "vpn drops", "restart it")
        store.add_answer(f"r{i}", finish_reason="stop", tokens=5, seconds=0.1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(answer, range(200)))
    assert all(store.rate(f"r{i}", "up") for i in range(200))
    assert len(list(store.ratings())) == 200
    store.close()


def test_only_so_many_texts_wait_in_memory(url):
    store = FeedbackStore(url, remember=2)
    for name in "abc":
        put(store, name, name, name)
    assert [store.rate(name, "up") for name in "abc"] == [False, True, True]


def test_no_text_at_all_where_none_may_be_kept(url):
    store = FeedbackStore(url, keep_text=False)
    put(store, "a", "q", "x")
    assert store.rate("a", "up") is False


def test_a_request_nobody_made(url):
    with pytest.raises(UnknownRequestError, match="no request 'x' was answered here"):
        FeedbackStore(url).rate("x", "up")


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////proc/none/f.db", "martian://x"])
def test_a_url_that_cannot_be_opened(bad):
    with pytest.raises(ConfigError, match=r"feedback\.url: cannot open"):
        FeedbackStore(bad)


def test_a_store_of_a_newer_release_is_not_touched(url, tmp_path):
    FeedbackStore(url).close()
    with sqlite3.connect(tmp_path / "deep" / "f.db") as db:
        db.execute("UPDATE deskroute_schema SET version = 99")
    db.close()
    with pytest.raises(ConfigError, match="written by a newer deskroute"):
        FeedbackStore(url)


def test_reading_makes_no_store(url, tmp_path):
    assert open_for_reading(url) is None
    assert not (tmp_path / "deep").exists()


def test_what_training_takes_from_ratings(url):
    """Liked answers as they are, better answers where people wrote one, corrected personas under the right one; disliked ones teach nothing."""
    store = FeedbackStore(url)
    for name, rating, extra in [
        ("liked", "up", {}),
        ("disliked", "down", {}),
        ("mended", "down", {"better_answer": "write to ann@example.org"}),
        ("moved", "down", {"correct_persona": "admin", "better_answer": "for admin"}),
        ("misrouted", "up", {"correct_persona": "admin"}),
    ]:
        put(store, name, f"{name} vpn question", f"answer to {name}")
        store.rate(name, rating, **extra)
    knowledge = KnowledgeBase.build([Article("vpn", "VPN", "the VPN", ("vpn",), steps=(Step("Restart."),))], {}, values={"desk_phone": "1"})
    ratings = list(store.ratings())
    values = {"desk_phone": "1", "desk_portal": "p"}
    assert [s.answer for s in feedback_samples(ratings, "field", knowledge, values)] == ["answer to liked", "write to [MAIL]"]
    assert [s.answer for s in feedback_samples(ratings, "admin", knowledge, values)] == ["for admin"]
