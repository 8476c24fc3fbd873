"""The endpoint in process, on the fake engine: what OpenAI's client sees, and every refusal in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import openai
import pytest

from persona_models.fake_engine import FakeEngine
from persona_models.protocol import BASE
from router.article import Article, Step
from router.classifier import PersonaClassifier
from router.config import load_config
from router.desk import READ_WORDS, Desk
from router.features import FeatureSpace
from router.feedback import FeedbackStore
from router.follow_up import FollowUps
from router.ingress import create_app
from router.knowledge import KnowledgeBase
from router.query import Query
from router.segment import FEATURES

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
WORDS = {"leadership": "board", "knowledge_worker": "dataset", "field": "customer", "admin": "payroll", "new_hire": "first"}


VPN = [Article("vpn", "VPN drops", "the VPN", ("vpn drops",), steps=(Step("Restart the VPN client."), Step("Call {desk_phone}.")))]
VPN_PROMPTS = {"vpn": ["my vpn drops"] * 5}


# Tells thanks, what goes on, and requests apart by a word each.
FOLLOW_UPS = FollowUps({"thanks": [9, 0, 0], "no": [0, 9, 0], "jams": [0, 0, 9], "mean": [0, 0, 9]}, [0, 1, 0], 0.8)


def tiny_classifier() -> PersonaClassifier:
    """One telling word per persona, and "vpn" or "printer" for the helpdesk."""
    texts = [f"{w} vpn" for w in WORDS.values()] + ["printer", "poem"]
    space = FeatureSpace.fit([Query(t) for t in texts * 3])
    weights = np.zeros((len(space), len(PERSONAS) + 1), dtype=np.float32)
    for i, name in enumerate(space.names):
        for p, persona in enumerate(PERSONAS):
            weights[i, p] = 12.0 if WORDS[persona] in name else 0.0
        weights[i, -1] = 15.0 if "vpn" in name or "printer" in name else 0.0
    bias = np.zeros(len(PERSONAS) + 1, dtype=np.float32)
    bias[-1] = -4.0
    return PersonaClassifier(space, PERSONAS, weights, bias, 1.0, 0.5, version="test")


@pytest.fixture
def engine():
    return FakeEngine(dict.fromkeys(PERSONAS, "7"))


@pytest.fixture
def make_app(engine, tmp_path):
    def make(articles=VPN, prompts=VPN_PROMPTS, **overrides):
        config = load_config(**overrides)
        knowledge = KnowledgeBase.build(articles, prompts, values={"desk_phone": "4357", "desk_portal": "the IT portal"})
        store = FeedbackStore(f"sqlite:///{tmp_path / 'f.db'}")
        classifier = tiny_classifier()
        classifier.follow_ups = FOLLOW_UPS
        desk = Desk(config, classifier, knowledge, dict.fromkeys([*PERSONAS, BASE], engine), store)

        async def status():
            return {"personas": engine.status()}

        return create_app(desk, status)

    return make


@pytest.fixture
async def http(make_app):
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        yield client


@pytest.fixture
async def sdk(http):
    return openai.AsyncOpenAI(base_url="http://desk/v1", api_key="none", http_client=http, max_retries=0)


def listened_to(engine, monkeypatch) -> list[list[str]]:
    """The texts of the messages of every request that reaches the engine from now on."""
    heard: list[list[str]] = []
    ask = engine.generate

    async def overheard(request):
        heard.append([m.content for m in request.messages])
        async for event in ask(request):
            yield event

    monkeypatch.setattr(engine, "generate", overheard)
    return heard


async def chat(http, text="my vpn drops at the customer", **body):
    return await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]} | body)


async def test_auto_routes_grounds_and_says_so(sdk):
    answer = await sdk.chat.completions.create(model="auto", messages=[{"role": "user", "content": "my vpn drops at the customer"}])
    block = answer.model_extra["deskroute"]
    assert answer.choices[0].message.content == "[field] About the VPN. | my vpn drops at the customer"
    assert (block["decision"], block["persona"], block["versions"]) == ("persona", "field", {"field": "7"})
    assert block["sources"][0]["id"] == "vpn"
    assert abs(sum(block["scores"].values()) - 1) < 1e-3
    assert block["reasons"][0]["persona"] == "field"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


CUTS_AT_LINES = {"weights": [0.0] * len(FEATURES), "bias": -9.0, "threshold": 0.5, "words": {}}
CUTS_AT_LINES["weights"][FEATURES.index("line")] = 20.0
TWO = "my vpn drops at the customer\nthe payroll printer is jammed again"


@pytest.fixture
async def splitting(make_app, engine, monkeypatch):
    """An SDK on a router that takes every line for a request."""
    made = tiny_classifier()
    made.segments = CUTS_AT_LINES
    monkeypatch.setitem(globals(), "tiny_classifier", lambda: made)
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        yield openai.AsyncOpenAI(base_url="http://desk/v1", api_key="none", http_client=client, max_retries=0)


async def test_two_requests_in_a_message_are_both_answered_in_order(splitting):
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "what is it?"}]
    answer = await splitting.chat.completions.create(model="auto", messages=[*earlier, {"role": "user", "content": TWO}])
    first, second = TWO.split("\n")
    assert answer.choices[0].message.content == f"[field] About the VPN. | {first}\n\n[admin] About the VPN. | {second}"
    block = answer.model_extra["deskroute"]
    assert (block["decision"], block["persona"], block["mix"]) == ("mix", "field", {"field": 0.5, "admin": 0.5})
    assert [(s["text"], s["persona"]) for s in block["segments"]] == [(first, "field"), (second, "admin")]
    assert block["versions"] == {"field": "7", "admin": "7"}
    assert [s["id"] for s in block["sources"]] == ["vpn"]
    assert answer.usage.completion_tokens == sum(len(part.split(" ")) for part in answer.choices[0].message.content.split("\n\n"))
    assert answer.choices[0].finish_reason == "stop"


async def test_without_a_limit_each_request_has_the_usual_one(splitting, engine, monkeypatch):
    asked, ask = [], engine.generate

    def noted(request):
        asked.append(request.max_tokens)
        return ask(request)

    monkeypatch.setattr(engine, "generate", noted)
    for limit in (None, 60):
        await splitting.chat.completions.create(model="auto", messages=[{"role": "user", "content": TWO}], **({"max_tokens": limit} if limit else {}))
    assert asked == [512, 512, 30, 30]


async def test_two_requests_are_streamed_one_after_the_other_and_share_the_limit(splitting):
    stream = await splitting.chat.completions.create(model="auto", messages=[{"role": "user", "content": TWO}], stream=True, max_tokens=6)
    chunks = [c async for c in stream]
    assert chunks[0].model_extra["deskroute"]["versions"] == {"field": "7", "admin": "7"}
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    first, second = text.split("\n\n")
    assert (first, second.split()[0]) == ("[field] About the", "[admin]")
    assert len(second.split(" ")) == 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


async def test_a_named_persona_answers_the_whole_message(splitting):
    answer = await splitting.chat.completions.create(model="admin", messages=[{"role": "user", "content": TWO}])
    assert len(answer.model_extra["deskroute"]["segments"]) == 1
    assert "\n\n" not in answer.choices[0].message.content


async def test_lines_of_one_persona_are_one_request(splitting):
    answer = await splitting.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "my vpn drops again\nand the customer waits at the vpn"}]
    )
    assert len(answer.model_extra["deskroute"]["segments"]) == 1


async def test_a_stream_begins_with_the_block_and_ends_with_usage(sdk):
    stream = await sdk.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "my vpn drops at the customer"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = [c async for c in stream]
    assert chunks[0].model_extra["deskroute"]["versions"] == {"field": "7"}
    assert all("deskroute" not in c.model_extra for c in chunks[1:])
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "[field] About the VPN. | my vpn drops at the customer"
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


async def test_a_persona_or_the_base_can_be_asked_for(sdk):
    ask = [{"role": "user", "content": "my vpn drops at the customer"}]
    admin = await sdk.chat.completions.create(model="admin", messages=ask)
    base = await sdk.chat.completions.create(model="base", messages=ask)
    assert admin.choices[0].message.content.startswith("[admin]")
    assert base.choices[0].message.content.startswith("[base]")
    assert base.model_extra["deskroute"]["persona"] is None


async def test_an_unknown_model_is_a_404_in_openais_shape(sdk):
    with pytest.raises(openai.NotFoundError) as fault:
        await sdk.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    assert fault.value.body["code"] == "model_not_found"
    assert fault.value.body["param"] == "model"
    assert "use auto, base or one of" in fault.value.body["message"]


async def test_what_is_no_helpdesk_request_is_declined_without_a_model(http, engine):
    engine.closed = True  # no engine is needed to decline
    body = (await chat(http, "write a poem")).json()
    assert body["deskroute"]["decision"] == "decline"
    assert "4357" in body["choices"][0]["message"]["content"]
    assert body["deskroute"]["sources"] == []


async def test_nobody_can_be_told_falls_back(http):
    body = (await chat(http, "my vpn drops")).json()
    assert (body["deskroute"]["decision"], body["deskroute"]["persona"]) == ("fallback", None)
    assert body["choices"][0]["message"]["content"].startswith("[admin]")


async def test_the_base_answers_a_fallback_where_it_is_told_to(make_app):
    transport = httpx.ASGITransport(make_app(fallback="base"))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        assert (await chat(client, "my vpn drops")).json()["choices"][0]["message"]["content"].startswith("[base]")


async def test_two_likely_personas_share_the_answer(make_app):
    transport = httpx.ASGITransport(make_app(policy__mix_margin=0.9))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        mixed = (await chat(client, "vpn for payroll and the board")).json()
    assert mixed["deskroute"]["decision"] == "mix"
    assert set(mixed["deskroute"]["mix"]) == {"admin", "leadership"}
    assert mixed["choices"][0]["message"]["content"].startswith("[admin:0.")


async def test_without_an_article_the_model_hands_over(http):
    body = (await chat(http, "printer payroll", model="admin")).json()
    assert "No article covers this request." in body["choices"][0]["message"]["content"]
    assert body["deskroute"]["sources"] == []


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"messages": []}, 400, "messages", "at least 1 of them"),
        ({}, 400, "messages", "missing"),
        ({"messages": "hi"}, 400, "messages", "must be a list"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, None, "at least one user turn with text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "only text is read"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"n": 2}, 400, "n", "only one answer"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "answers are text"),
        ({"modalities": ["text", "audio"]}, 400, "modalities", "text alone"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"frequency_penalty": -1}, 400, "frequency_penalty", "not supported"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"many": 1}}, 400, "logit_bias.many", "valid integer"),
        ({"stop": ["x"] * 17}, 400, "stop", "16"),
        ({"metadata": {"tenure_days": "many"}}, 400, "metadata.tenure_days", "whole number"),
        ({"metadata": {"title": ["CFO"]}}, 400, "metadata.title", "must be a string"),
    ],
)
async def test_bad_bodies_are_named(http, body, status, param, says):
    answer = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "vpn customer"}]} | body if body else {})
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


async def test_what_clients_send_unset_is_unset(http):
    unset = ("model", "stream", "metadata", "stop", "n", "tools", "response_format", "modalities", "presence_penalty", "logprobs", "user")
    assert (await chat(http, **dict.fromkeys(unset))).status_code == 200
    neutral = {"response_format": {"type": "text"}, "modalities": ["text"], "presence_penalty": 0, "tools": [], "n": 1, "unheard_of": {"a": 1}}
    assert (await chat(http, **neutral)).status_code == 200
    assert (await chat(http, metadata={"tenure_days": 12})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route"])
async def test_half_an_emoji_is_no_fault(http, path):
    raw = rb'{"metadata": {"title": "\ud83d"}, "messages": [{"role": "user", "content": "my vpn drops \ud83d at the customer \ud83d\ude00"}]}'
    answer = await http.post(path, content=raw)
    assert answer.status_code == 200
    assert answer.json()["deskroute"]["segments"][0]["text"] == "my vpn drops \ufffd at the customer \U0001f600"


async def test_a_greeting_is_asked_for_the_matter(http, engine):
    body = (await chat(http, "Hello, can you help me?")).json()
    assert body["choices"][0]["message"]["content"].startswith("This is the IT service desk. Say in a sentence what does not work")
    assert (body["deskroute"]["decision"], body["deskroute"]["sources"]) == ("decline", [])
    # Who names a persona is answered by it, and a short turn of a conversation goes on with what was said before.
    assert (await chat(http, "Hello", model="field")).json()["deskroute"]["decision"] == "persona"
    history = [{"role": "user", "content": "my vpn drops at the customer"}, {"role": "assistant", "content": "Restart it."}]
    assert (await http.post("/v1/route", json={"messages": [*history, {"role": "user", "content": "again"}]})).json()["deskroute"][
        "persona"
    ] == "field"


@pytest.mark.parametrize("raw", [b"{", b"", b"null", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route", "/v1/feedback"])
async def test_what_is_no_json_object_is_a_400(http, raw, path):
    answer = await http.post(path, content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


async def test_a_huge_body_is_a_413_whether_or_not_it_says_its_length(make_app):
    transport = httpx.ASGITransport(make_app(http__max_body_bytes=2000))

    async def chunks():
        for _ in range(10):
            yield b"x" * 1000

    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        for content in (b"x" * 5000, chunks()):
            answer = await client.post("/v1/chat/completions", content=content)
            assert answer.status_code == 413
            assert "larger than 2000 bytes" in answer.json()["error"]["message"]


async def test_paths_and_methods_that_do_not_exist(http):
    missing = await http.get("/v1/assistants")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "GET /v1/assistants does not exist here; see GET / for what does")
    assert (await http.get("/v1/chat/completions")).status_code == 405


async def test_an_engine_that_fails_is_a_503_before_and_an_error_event_within_a_stream(http, engine):
    engine.fail_after = 0
    answer = await chat(http)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    engine.fail_after = 3
    text = (await chat(http, stream=True)).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "told to fail" in events[-1]["error"]["message"]
    assert text.rstrip().endswith("data: [DONE]")


async def test_an_unexpected_fault_shows_no_traceback(http, engine, monkeypatch):
    monkeypatch.setattr(engine, "generate", lambda request: 1 / 0)
    answer = await chat(http)
    assert answer.status_code == 500
    assert "ZeroDivision" not in answer.text


async def test_a_client_that_leaves_cancels_its_row(engine, make_app):
    engine.token_s = 0.01
    left = asyncio.Event()
    body = json.dumps({"messages": [{"role": "user", "content": "vpn customer " * 200}], "stream": True}).encode()
    sent = []

    async def receive():
        if not sent:
            sent.append(1)
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            left.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"", "asgi": {"version": "3.0"}}
    await make_app()(scope | {"raw_path": b"", "scheme": "http", "server": ("desk", 80), "root_path": "", "http_version": "1.1"}, receive, send)
    assert (engine.active, engine.cancelled) == (0, 1)


async def test_route_scores_one_or_many_without_answering(http, engine):
    one = (await http.post("/v1/route", json={"messages": [{"role": "user", "content": "vpn board"}]})).json()
    assert one["deskroute"]["persona"] == "leadership"
    many = (await http.post("/v1/route", json={"inputs": ["vpn board", {"id": "b", "text": "vpn payroll", "profile": {"title": "x"}}]})).json()
    assert [d["persona"] for d in many["data"]] == ["leadership", "admin"]
    assert many["data"][1]["id"] == "b"
    bad = await http.post("/v1/route", json={"inputs": ["ok", {"profile": {}}]})
    assert bad.json()["error"]["message"] == "inputs.1: give either text or messages"


async def test_a_new_matter_begins_a_new_conversation(make_app, engine, monkeypatch):
    """What was said of the old one would have the model go on about it; a turn that goes on with it keeps all of it."""
    articles = [
        Article("vpn", "VPN drops", "the VPN", ("vpn drops",), steps=(Step("Restart the VPN client."),)),
        Article("printer", "Printer jams", "the printer", ("printer jams",), steps=(Step("Open the printer's flap."),)),
    ]
    prompts = {"vpn": ["my vpn drops"] * 5, "printer": ["the printer jams"] * 5}
    transport = httpx.ASGITransport(make_app(articles=articles, prompts=prompts))
    heard = listened_to(engine, monkeypatch)
    said = [("system", "be kind"), ("user", "my vpn drops at the customer"), ("assistant", "Restart the VPN client.")]

    async def turn(client, text):
        messages = [{"role": r, "content": c} for r, c in [*said, ("user", text)]]
        body = (await client.post("/v1/chat/completions", json={"messages": messages})).json()
        return body["deskroute"]["sources"][0]["id"]

    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        assert await turn(client, "the printer jams") == "printer"
        assert heard.pop() == ["the printer jams"]
        # A question about the answer is answered from its article.
        assert await turn(client, "what does it mean?") == "vpn"
        assert heard.pop() == ["what does it mean?"]
        assert await turn(client, "hm, the same") == "vpn"
        assert heard.pop() == [*(c for r, c in said if r != "system"), "hm, the same"]


async def test_a_complaint_is_handed_over(make_app, engine, monkeypatch):
    """The built-in models say of some that they are glad to hear it; others are told all that was said."""
    heard = listened_to(engine, monkeypatch)
    messages = [{"role": "user", "content": "my vpn drops at the customer"}, {"role": "assistant", "content": "Restart it."}]
    messages.append({"role": "user", "content": "no, the same"})
    for base in ("builtin", "someone/large"):
        transport = httpx.ASGITransport(make_app(base=base))
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            said = (await client.post("/v1/chat/completions", json={"messages": messages})).json()["choices"][0]["message"]["content"]
        if base == "builtin":
            assert said.startswith("That goes beyond what I have written down. Call 4357")
            assert heard == []
    assert heard == [[m["content"] for m in messages]]


async def test_thanks_are_no_complaint(http, make_app, engine, monkeypatch):
    """The built-in models cannot tell the two apart; others are told all that was said."""
    messages = [{"role": "user", "content": "my vpn drops at the customer"}, {"role": "assistant", "content": "Restart it."}]
    messages.append({"role": "user", "content": "thanks!"})
    body = (await http.post("/v1/chat/completions", json={"messages": messages})).json()
    assert body["choices"][0]["message"]["content"] == "Good to hear. If it comes back, write again, or call 4357."
    assert (body["deskroute"]["sources"], body["deskroute"]["persona"]) == ([], "field")
    # Nobody has answered yet.
    first = (await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "my vpn drops, thanks!"}]})).json()
    assert first["deskroute"]["sources"][0]["id"] == "vpn"
    transport = httpx.ASGITransport(make_app(base="someone/large"))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        said = (await client.post("/v1/chat/completions", json={"messages": messages})).json()["choices"][0]["message"]["content"]
    assert said.endswith("| thanks!")


@pytest.mark.parametrize("base", ["builtin", "someone/large"])
async def test_of_a_long_conversation_the_built_in_models_read_the_matter_alone(make_app, engine, monkeypatch, base):
    articles = [Article(name, name, f"the {name}", (f"{name} fails",), steps=(Step(f"Look after the {name}."),)) for name in ("vpn", "printer")]
    prompts = {"vpn": ["my vpn drops"] * 5, "printer": ["the printer jams"] * 5}
    heard = listened_to(engine, monkeypatch)
    said = ["my vpn drops at the customer", "Restart it.", "no", "Sorry.", "the printer jams", "Open the flap.", "hm", "And now?", "hm, worse"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    transport = httpx.ASGITransport(make_app(articles=articles, prompts=prompts, base=base))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        body = (await client.post("/v1/chat/completions", json={"messages": messages, "model": "field"})).json()
    matter = said.index("the printer jams") if body["deskroute"]["sources"][0]["id"] == "printer" else 0
    assert heard == [[said[matter], said[matter + 1], said[-1]] if base == "builtin" else said]


@pytest.mark.parametrize("base", ["builtin", "someone/large"])
async def test_of_a_long_message_the_built_in_models_read_the_beginning(make_app, engine, monkeypatch, base):
    """And all of it is looked at for the article."""
    heard = listened_to(engine, monkeypatch)
    long = "My VPN keeps dropping. " + "It was raining that day and the trains were late. " * 10 + "Regards, Tom"
    transport = httpx.ASGITransport(make_app(base=base))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        for text in (long, "vpn drops " * 3000):
            answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], "model": "field"})
    [first], [whole] = heard
    if base != "builtin":
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "only 4096 fit" in answer.json()["error"]["message"]
    if base == "builtin":
        assert whole == ("vpn drops " * 30).strip()
        assert first.startswith("My VPN keeps dropping. It was raining")
        assert 50 < len(first.split()) <= READ_WORDS
        assert first.endswith("were late.")
    else:
        assert (first, whole) == (long, "vpn drops " * 3000)


async def test_models_health_ready_metrics(http, engine):
    models = (await http.get("/v1/models")).json()["data"]
    assert [m["id"] for m in models] == ["auto", "base", *PERSONAS]
    assert models[2]["version"] == "7"
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).json()["pools"]["personas"]["ready"] is True
    await chat(http)
    page = (await http.get("/metrics")).text
    assert 'deskroute_requests_total{decision="persona",endpoint="chat",persona="field",status="200"} 1.0' in page
    engine.closed = True
    assert (await http.get("/readyz")).status_code == 503


async def test_every_failed_request_is_counted(http):
    await chat(http, max_tokens=0)
    await chat(http, model="gpt-4")
    await http.post("/v1/feedback", json={"request_id": "nope", "rating": "up"})
    await http.get("/v1/anything/42")
    await http.post("/v1/route", json={"messages": [{"role": "user", "content": "my vpn drops at the customer"}]})
    page = (await http.get("/metrics")).text
    for endpoint, status in (("chat", 400), ("chat", 404), ("feedback", 404), ("other", 404)):
        assert f'deskroute_requests_total{{decision="",endpoint="{endpoint}",persona="",status="{status}"}} 1.0' in page
    assert 'deskroute_requests_total{decision="persona",endpoint="route",persona="field",status="200"} 1.0' in page


async def test_one_model_can_be_asked_about(sdk):
    assert (await sdk.models.retrieve("auto")).id == "auto"
    assert (await sdk.models.retrieve("field")).model_extra["version"] == "7"
    with pytest.raises(openai.NotFoundError, match="use auto, base or one of"):
        await sdk.models.retrieve("gpt-4")


async def test_feedback_takes_the_answers_own_id(http):
    said = (await chat(http)).json()
    assert (await http.post("/v1/feedback", json={"request_id": said["id"], "rating": "up"})).status_code == 201
    unknown = await http.post("/v1/feedback", json={"request_id": "x", "rating": "up", "persona": "field"})
    assert "there is no such field; there are request_id, rating" in unknown.json()["error"]["message"]


async def test_feedback_is_stored_with_the_text_of_its_request(http, tmp_path):
    said = (await chat(http, user="u1", metadata={"title": "Driver"})).json()
    request_id = said["deskroute"]["request_id"]
    answer = await http.post(
        "/v1/feedback", json={"request_id": request_id, "rating": "down", "correct_persona": "admin", "better_answer": "Try this"}
    )
    assert (answer.status_code, answer.json()["text_stored"]) == (201, True)
    (rating,) = FeedbackStore(f"sqlite:///{tmp_path / 'f.db'}").ratings()
    assert (rating.persona, rating.correct_persona, rating.answer) == ("field", "admin", said["choices"][0]["message"]["content"])
    assert rating.profile == {"title": "Driver"}


async def test_a_text_that_nobody_rated_is_nowhere_on_the_disk(http, tmp_path):
    await chat(http, "vpn customer xyzzyplugh")
    assert all(b"xyzzyplugh" not in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


async def test_bad_feedback(http):
    missing = await http.post("/v1/feedback", json={"request_id": "nope", "rating": "up"})
    assert missing.status_code == 404
    assert "no request 'nope'" in missing.json()["error"]["message"]
    assert (await http.post("/v1/feedback", json={"request_id": "x", "rating": "great"})).status_code == 400
    assert (await http.post("/v1/feedback", json={"request_id": "x", "rating": "up", "stars": 5})).json()["error"]["param"] == "stars"


async def test_an_api_key_is_asked_for_where_one_is_set(make_app, monkeypatch):
    monkeypatch.setenv("DESKROUTE_API_KEYS", "s3cret, other")
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        assert (await chat(client)).json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/v1/models", headers={"authorization": "Bearer wrong"})).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": "Bearer other"})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200


async def test_log_probabilities_come_in_openais_shape(make_app):
    """Read by OpenAI's own client, whole and streamed."""
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    client = openai.AsyncOpenAI(base_url="http://desk/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport))
    asked = {"model": "field", "messages": [{"role": "user", "content": "my vpn drops"}], "logprobs": True, "top_logprobs": 1}
    whole = await client.chat.completions.create(**asked)
    tokens = whole.choices[0].logprobs.content
    assert "".join(t.token for t in tokens) == whole.choices[0].message.content
    assert [t.top_logprobs[0].token for t in tokens] == [t.token for t in tokens]
    streamed = [t.token async for chunk in await client.chat.completions.create(**asked, stream=True) if chunk.choices
                for t in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]  # fmt: skip
    assert streamed == [t.token for t in tokens]
    plain = await client.chat.completions.create(model="field", messages=asked["messages"])
    assert plain.choices[0].logprobs is None
