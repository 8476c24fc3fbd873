"""Ticket files: what is read, what is kept aside and why, and every file that cannot be used."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from persona_models.errors import TicketError
from pipelines.dataset import split_tickets
from pipelines.imports import import_tickets
from pipelines.tickets import Ticket
from router.config import load_config
from router.redaction import redact

PERSONAS = ("leadership", "field")


def csv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "tickets.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_columns_are_found_under_their_usual_names_in_any_case(tmp_path, read_tickets):
    path = csv(tmp_path, "Opened_At;Caller;Description;Resolution;Job_Title\n2026-01-02;u1;VPN down;Restart it;Driver\n")
    (ticket,), report, _ = read_tickets(path, PERSONAS)
    assert (ticket.prompt, ticket.answer, ticket.requester, ticket.profile.title) == ("VPN down", "Restart it", "u1", "Driver")
    assert ticket.created == datetime(2026, 1, 2, tzinfo=UTC)
    assert (report.rows, report.reasons) == (1, {})


def test_quoted_line_breaks_and_commas(tmp_path, read_tickets):
    (ticket,), _, _ = read_tickets(csv(tmp_path, 'prompt,answer\n"Hello,\nVPN ""down""",Restart\n'), PERSONAS)
    assert ticket.prompt == 'Hello,\nVPN "down"'


def test_rows_that_cannot_be_used_are_kept_aside_with_the_reason(tmp_path, read_tickets):
    text = "prompt,answer,persona,created,tenure_days\nok,yes,field,,\n,yes,,,\nx,,,,\nx,y,pirate,,\nx,y,,yesterday,\nx,y,,,many\nx,y,field,,,,,\n"
    tickets, _, aside = read_tickets(csv(tmp_path, text), PERSONAS)
    assert len(tickets) == 1
    reasons = [q["reason"] for q in aside]
    for part in ("no prompt", "no answer", "'pirate'", "'yesterday'", "'many'", "more fields than the heading"):
        assert sum(part in r for r in reasons) == 1, (part, reasons)


def test_jsonl_rows_likewise(tmp_path, read_tickets):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"question": "q", "reply": "a"}) + '\n{"question": \n[1]\n\n')
    tickets, _, aside = read_tickets(path, PERSONAS)
    assert len(tickets) == 1
    assert [q["row"] for q in aside] == [2, 3]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood(tmp_path, read_tickets, encoding):
    (ticket,), _, _ = read_tickets(csv(tmp_path, "prompt,answer\nSchlüssel,ja\n", encoding), PERSONAS)
    assert ticket.prompt == "Schlüssel"


def test_another_encoding_is_named_and_can_be_given(tmp_path, read_tickets):
    path = csv(tmp_path, "prompt,answer\nok,yes\nSchlüssel,ja\n", "cp1252")
    with pytest.raises(TicketError, match=r"is not utf-8-sig text \(line 3, byte \d+\); .*--encoding cp1252"):
        read_tickets(path, PERSONAS)
    tickets, _, _ = read_tickets(path, PERSONAS, encoding="cp1252")
    assert tickets[1].prompt == "Schlüssel"
    with pytest.raises(TicketError, match="the encoding 'klingon' does not exist"):
        read_tickets(path, PERSONAS, encoding="klingon")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("prompt,answer\n", "has a heading but no rows"),
        ("subject,answer\nx,y\n", "has no column prompt (or question, request"),
        ("prompt,date\nx,y\n", "has no column answer (or resolution"),
        ("prompt,answer\n,\n", "none of its 1 rows can be used"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, says):
    with pytest.raises(TicketError) as fault:
        import_tickets(csv(tmp_path, text), tmp_path / "out", load_config())
    assert says in fault.value.message
    assert "tickets.csv" in fault.value.message


def test_missing_files_and_other_formats(tmp_path, read_tickets):
    with pytest.raises(TicketError, match="cannot be read"):
        read_tickets(tmp_path / "none.csv", PERSONAS)
    with pytest.raises(TicketError, match=r"read from .csv, .jsonl and .parquet"):
        read_tickets(tmp_path / "t.xlsx", PERSONAS)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("write to ann.lee+it@mail.example.com please", "write to [MAIL] please"),
        ("my password is Hunter2! and it fails", "my password is [SECRET] and it fails"),
        ("call me on +44 20 7946 0123 today", "call me on [PHONE] today"),
        ("host 10.12.0.7 is down", "host [IP] is down"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("IBAN DE44 5001 0517 5407 3249 31 ok", "IBAN [IBAN] ok"),
        ("see https://intra.example.com/x?id=3 now", "see [URL] now"),
    ],
)
def test_personal_data_becomes_a_typed_placeholder(text, want):
    assert redact(text) == want


@pytest.mark.parametrize(
    "text", ["error 0x80070005 after build 22631.3007", "room 4357, floor 3", "call the service desk on 4357", "wait 15 minutes, twice"]
)
def test_what_is_not_personal_stays(text):
    assert redact(text) == text


def test_the_newest_are_held_out_and_nobody_is_on_both_sides():
    tickets = [Ticket(f"p{i}", "a", requester=f"u{i % 7}", created=datetime(2026, 1, 1 + i, tzinfo=UTC)) for i in range(28)]
    tickets += [Ticket(f"late{i}", "a", requester="late", created=datetime(2026, 3, 1 + i, tzinfo=UTC)) for i in range(5)]
    train, held = split_tickets(tickets)
    assert {t.requester for t in held} == {"late"}
    assert not {t.requester for t in train} & {t.requester for t in held}
    assert len(train) + len(held) == len(tickets)


def test_the_same_prompt_is_never_on_both_sides():
    tickets = [Ticket("same words", "a"), *(Ticket(f"p{i}", "a") for i in range(20)), Ticket("Same  Words", "b")]
    train, held = split_tickets(tickets)
    assert not {" ".join(t.prompt.lower().split()) for t in train} & {" ".join(t.prompt.lower().split()) for t in held}
