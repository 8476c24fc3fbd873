"""router/article.py: one Markdown file in, the model's text out."""

import pytest

from persona_models.errors import ArticleError
from router.article import MAX_WORDS, fill, handover_document, parse_article, read_article, slots_in

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
FULL = """---
id: vpn
subject: the VPN connection
slots:
  gateway: [Main gateway, Central access]
  minutes: [5, 10]
order:
  leadership: [2]
  field: [2, 1]
---
# VPN does not come up

## Symptoms
- vpn drops
* "gateway not reachable"

## Cause
The network in between
blocks the tunnel.

## Steps
1. Quit {vpn_client}.
   - short: Quit it.
   - full: Right-click the icon and quit {vpn_client}.
2) Choose {gateway} and wait {minutes} minutes
   before the next try.

## Escalate
Call {desk_phone}.

## Field
Use the hotspot.

## For knowledge worker
Run nslookup.
"""
VALUES = {"vpn_client": "the tunnel app", "desk_phone": "4357", "desk_portal": "MyDesk"}


def full():
    return parse_article(FULL, "file_name", source="vpn.md", personas=PERSONAS)


def test_every_part_is_read():
    article = full()
    assert (article.id, article.title, article.subject) == ("vpn", "VPN does not come up", "the VPN connection")
    assert article.symptoms == ("vpn drops", '"gateway not reachable"')
    assert article.cause == "The network in between blocks the tunnel."
    assert [s.plain for s in article.steps] == ["Quit {vpn_client}.", "Choose {gateway} and wait {minutes} minutes before the next try."]
    assert article.steps[0].say("short") == "Quit it."
    assert article.steps[1].say("full") == article.steps[1].plain
    assert article.notes == {"field": "Use the hotspot.", "knowledge_worker": "Run nslookup."}
    assert article.order == {"leadership": (2,), "field": (2, 1)}
    assert article.slots == {"gateway": ("Main gateway", "Central access"), "minutes": ("5", "10")}


def test_rendering_follows_the_persona():
    field = full().render("field", values=VALUES).splitlines()
    assert field == [
        "About the VPN connection.",
        "Cause: The network in between blocks the tunnel.",
        "1. Choose Main gateway and wait 5 minutes before the next try.",
        "2. Quit it.",
        "Note: Use the hotspot.",
        "Desk: Call 4357.",
    ]
    neutral = full().render(values=VALUES)
    assert "1. Quit the tunnel app." in neutral
    assert "Note:" not in neutral
    assert "Right-click" in full().render("new_hire", values=VALUES)
    assert "Right-click" in full().render("field", wording="full", values=VALUES)


def test_given_values_go_before_the_articles_own_and_unknown_slots_stay():
    text = full().render(values={"gateway": "EU-West", "desk_phone": "1"})
    assert "Choose EU-West and wait 5 minutes" in text
    assert "Quit {vpn_client}." in text


def test_the_phone_is_always_there():
    article = parse_article("# T\n\n1. Do it.\n\n## Escalate\nAsk the desk.\n", "t", source="t.md")
    assert article.render(values=VALUES).endswith("Desk: Ask the desk. Phone: 4357.")
    assert "4357" in parse_article("# T\nDo it.", "t", source="t.md").render(values=VALUES)
    assert "4357" in handover_document(VALUES)
    assert "{" not in handover_document(VALUES)


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ("Open the box. Press the knob!\nDone.", ["Open the box.", "Press the knob!", "Done."]),
        ("Do this:\n\n- first\n- second\n", ["first", "second"]),
        ("## What to do\n1. first\n2. second\n", ["first", "second"]),
        ("## Anything\nOnly text here.", ["Only text here."]),
    ],
)
def test_a_company_article_of_any_form_has_steps(body, steps):
    article = parse_article(f"# Title\n{body}", "my_id", source="x.md")
    assert [s.plain for s in article.steps] == steps
    assert (article.id, article.subject) == ("my_id", '"Title"')


def test_a_long_article_is_cut_after_a_whole_step():
    words = " ".join(["word"] * 40) + "."
    article = parse_article("# Title\n" + "\n".join([words] * 20), "x", source="x.md")
    assert 1 <= len(article.steps) <= MAX_WORDS // 40 + 1
    assert all(s.plain.endswith(".") for s in article.steps)


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "vpn.md"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    assert read_article(path, PERSONAS) == full()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no title here", "no title"),
        ("# Only a title\n", "no text"),
        ("---\nid: x\n# T\ntext", "never closed"),
        ("---\n- a\n- b\n---\n# T\ntext", "key: value"),
        ("---\na: [\n---\n# T\ntext", "YAML"),
        ("---\norder: {leadership: [9]}\n---\n# T\n1. a\n", "leadership"),
        ("---\norder: {leadership: [1, 1]}\n---\n# T\n1. a\n", "leadership"),
        ("---\norder: {boss: [1]}\n---\n# T\n1. a\n", "boss"),
        ("---\norder: [1]\n---\n# T\n1. a\n", "order"),
        ("---\nslots: {x: []}\n---\n# T\n1. a\n", "slots"),
    ],
)
def test_faults_name_file_and_matter(text, fault):
    with pytest.raises(ArticleError, match=fault) as caught:
        parse_article(text, "x", source="broken.md", personas=PERSONAS)
    assert "broken.md" in caught.value.message


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "x.md"
    path.write_bytes(b"# T\xff")
    with pytest.raises(ArticleError, match="byte 3"):
        read_article(path)


def test_slots():
    assert slots_in("{a} and {b_2}, not {Three} or { d }") == {"a", "b_2"}
    assert fill("{a} {b}", {"a": "1"}) == "1 {b}"
