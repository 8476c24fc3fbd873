"""What the shipped router must do whatever it was trained on: easy cases, words that must not matter, and words that must push one way."""

from __future__ import annotations

import pytest

from persona_models.protocol import Message
from router.config import load_config
from router.loading import load_classifier, load_knowledge
from router.policy import decide
from router.query import Profile, Query, query_of
from router.segment import Segmenter, requests_in


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(load_config())


@pytest.fixture(scope="module")
def knowledge():
    return load_knowledge(load_config())


def score(classifier, text, **profile):
    return classifier.score([Query(text, Profile(**profile))])[0]


@pytest.mark.parametrize(
    ("text", "persona"),
    [
        ("My VPN keeps dropping at the customer's site, no Wi-Fi here", "field"),
        ("standing in the van at a client's plant, the tablet does not load my jobs", "field"),
        ("the payroll run does not post and the invoices must go out today", "admin"),
        ("it is my second day as an intern and nobody told me how to log in", "new_hire"),
        ("the board papers do not open and the supervisory board meets in an hour", "leadership"),
        ("git push is rejected from my build pipeline, the model training waits", "knowledge_worker"),
    ],
)
def test_plain_cases(classifier, text, persona):
    scores = score(classifier, text)
    assert max(scores.personas, key=scores.personas.get) == persona
    assert decide(scores, load_config().policy).decision != "decline"


@pytest.mark.parametrize(
    ("profile", "persona"),
    [
        ({"title": "Vice President Sales", "tenure_days": 900}, "leadership"),
        ({"title": "Service Technician", "tenure_days": 900}, "field"),
        ({"title": "Payroll Clerk", "department": "Finance", "tenure_days": 900}, "admin"),
        ({"title": "Data Engineer", "department": "R&D", "tenure_days": 900}, "knowledge_worker"),
        ({"title": "Intern", "tenure_days": 4}, "new_hire"),
    ],
)
def test_the_profile_decides_where_the_text_does_not(classifier, profile, persona):
    scores = score(classifier, "Outlook asks for my password again and again", **profile)
    assert max(scores.personas, key=scores.personas.get) == persona


@pytest.mark.parametrize("change", [str.upper, str.lower, lambda t: t + "!!!", lambda t: "hello, " + t + " thanks"])
def test_case_and_politeness_do_not_change_who_it_is(classifier, change):
    text = "The tablet does not sync here at the customer's plant"
    before, after = score(classifier, text), score(classifier, change(text))
    assert max(before.personas, key=before.personas.get) == max(after.personas, key=after.personas.get) == "field"


def test_a_telling_word_pushes_its_way(classifier):
    plain = score(classifier, "the printer does not work").personas
    assert score(classifier, "the printer does not work, the payroll run waits").personas["admin"] > plain["admin"]
    assert score(classifier, "the printer in my van does not work at the customer's").personas["field"] > plain["field"]


def test_reasons_name_words_of_the_text(classifier):
    reasons = score(classifier, "payroll run fails for the invoices").reasons
    assert reasons
    assert any(w in reasons[0].feature for w in ("payroll", "invoices", "run", "fails"))


@pytest.mark.parametrize(
    "text", ["write me a poem about the moon", "how long do I boil an egg", "qwertz asdf jklö", "Wer hat gestern das Spiel gewonnen?"]
)
def test_what_is_no_request_is_declined(classifier, text):
    assert decide(score(classifier, text), load_config().policy).decision == "decline"


@pytest.mark.parametrize(
    ("text", "article"),
    [
        ("My VPN keeps dropping at the customer's site, no Wi-Fi here", "vpn"),
        ("I forgot my password and cannot sign in", "password_reset"),
        ("my laptop was stolen on the train", "lost_device"),
        ("the printer queue is stuck, nothing comes out", "printer"),
        ("git push says permission denied (publickey)", "ssh_key"),
    ],
)
def test_plain_requests_find_their_article(knowledge, text, article):
    assert article in [m.article.id for m in knowledge.match(text, 2)]


def test_a_companys_article_wins_for_its_own_matter(knowledge, tmp_path):
    from router.knowledge import load_folder

    (tmp_path / "kiln.md").write_text("# Kiln controller shows E77\n\n1. Press the amber reset for five seconds.\n2. Call the kiln hall on 88321.\n")
    both = knowledge.with_articles(load_folder(tmp_path))
    assert both.match("the kiln controller shows E77", 1)[0].article.id == "kiln"
    assert both.match("my laptop was stolen on the train", 1)[0].article.id == "lost_device"


def turns(*texts):
    messages = []
    for text in texts:
        messages += [Message("user", text), Message("assistant", "Ask the board, or the payroll office; the van is outside.")]
    return query_of(messages[:-1])


def leading(classifier, query):
    scores = classifier.score([query])[0]
    return max(scores.personas, key=scores.personas.get)


def test_a_neutral_follow_up_keeps_the_persona_and_a_change_changes_it(classifier):
    first = "standing in the van at a client's plant, the tablet does not load my jobs"
    assert leading(classifier, turns(first, "did that, same error again")) == "field"
    assert leading(classifier, turns(first, "did that", "it now says error 49, what does that mean?")) == "field"
    changed = "now something else: our intern who started on Monday has no login yet and nobody told her whom to ask"
    assert leading(classifier, turns(first, changed)) == "new_hire"


def test_what_gives_nobody_away_falls_back_unless_a_profile_tells(classifier):
    settings = load_config().policy
    neutral = "outlook keeps asking for my password"
    assert decide(score(classifier, neutral), settings).decision == "fallback"
    assert decide(score(classifier, neutral, title="Payroll Clerk", department="Finance"), settings).persona == "admin"


def test_slips_do_not_change_who_it_is(classifier):
    assert leading(classifier, Query("the payrol run does not pst and the invocies must go out today")) == "admin"


@pytest.mark.parametrize(
    "text", ["", "   ", "😀😀😀", "\x00\x01\x02", "مرحبا الطابعة لا تعمل", "\u202eabc", "a" * 200_000, "vpn " * 50_000, "\n\n\n- \n- "]
)
def test_odd_texts_get_a_decision(classifier, text):
    scores = score(classifier, text)
    assert sum(scores.personas.values()) == pytest.approx(1)
    assert decide(scores, load_config().policy).decision in ("persona", "mix", "fallback", "decline")
    assert requests_in(classifier, Segmenter.from_facts(classifier.segments), Query(text), load_config().policy) == []
