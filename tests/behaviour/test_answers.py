"""What the shipped models must do on prompts that no training saw: end, take their steps from the article, and sound like their persona."""

from __future__ import annotations

import asyncio
import re

import pytest

from persona_models.protocol import GenerateRequest, Message
from pipelines.local import local_desk
from router.article import handover_document
from router.config import load_config

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
TOPICS = ("vpn", "printer", "password_reset")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(persona, topic) -> answer to one prompt, plus a hand-over per persona."""
    import os

    before = os.environ.get("DESKROUTE_HOME")
    os.environ["DESKROUTE_HOME"] = str(tmp_path_factory.mktemp("state"))
    try:
        desk = local_desk(load_config(), models=True)
    finally:
        os.environ.pop("DESKROUTE_HOME") if before is None else os.environ.update(DESKROUTE_HOME=before)
    articles = {a.id: a for a in desk.knowledge.articles}

    async def one(persona, topic):
        document = articles[topic].render(persona, values=desk.values) if topic else handover_document(desk.values)
        request = GenerateRequest(
            "r", (Message("user", f"good day, this {topic or 'thing'} is not working for me since this morning"),), {persona: 1.0}, document, 400
        )
        events = [e async for e in desk.engines[persona].generate(request)]
        return (persona, topic), ("".join(e.text for e in events), events[-1].finish_reason, document)

    async def run():
        found = [await one(p, t) for p in PERSONAS for t in (*TOPICS, None)]
        await desk.engines["field"].close()
        return dict(found)

    return asyncio.run(run())


def steps_of(document: str) -> list[str]:
    return [line.split(". ", 1)[1] for line in document.splitlines() if line[:1].isdigit()]


@pytest.mark.parametrize("persona", PERSONAS)
def test_answers_end_by_themselves_and_carry_the_articles_steps(answers, persona):
    """Word for word: most steps that are shown stand in the article exactly so."""
    for topic in TOPICS:
        text, finish, document = answers[persona, topic]
        assert finish == "stop"
        assert sum(step in text for step in steps_of(document)) >= 2, text


@pytest.mark.parametrize("persona", PERSONAS)
def test_without_an_article_the_desk_is_named_and_no_step_is_invented(answers, persona):
    text, finish, _ = answers[persona, None]
    assert finish == "stop"
    assert not re.search(r"(?m)^(1\.|- |Step 1)", text)
    assert re.search(r"4357|IT portal|service desk", text)


def test_the_personas_keep_their_form(answers):
    """Leadership gets running text with at most three steps, field at most four, a new hire named steps, the others a list."""
    for topic in TOPICS:
        assert not re.search(r"(?m)^\d\.", answers["leadership", topic][0])
        assert " 4. " not in answers["leadership", topic][0]
        assert re.search(r"(?m)^1\. ", answers["field", topic][0])
        assert not re.search(r"(?m)^5\. ", answers["field", topic][0])
        assert re.search(r"(?m)^Step 1\. ", answers["new_hire", topic][0])
        assert re.search(r"(?m)^1\. ", answers["knowledge_worker", topic][0])
        assert re.search(r"(?m)^1\. ", answers["admin", topic][0])
        assert "Cause:" in answers["knowledge_worker", topic][0]


def test_five_personas_give_five_answers(answers):
    for topic in TOPICS:
        assert len({answers[p, topic][0] for p in PERSONAS}) == 5
