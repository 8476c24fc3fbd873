"""Ticket exports: the systems' own forms, personas by the router, near-duplicates, what is kept aside, and a file that does not fit into a quick look."""

from __future__ import annotations

import csv
import json
import resource

import pandas
import pytest

from persona_models.errors import ConfigError, TicketError
from pipelines.cli import main
from pipelines.imports import NearDuplicates, import_tickets
from pipelines.tickets import read_map
from router.config import load_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_servicenow(tmp_path, read_tickets):
    heading = ["number", "short_description", "description", "close_notes", "caller_id", "opened_at", "state", "assigned_to"]
    rows = [
        [
            "INC0010001",
            "VPN drops",
            "Hi, it drops on site. Joan Marsh",
            "Hello Joan, restart it. Regards, Piet",
            "Joan Marsh",
            "2026-03-01 10:00:00",
            "Closed",
            "Piet Vos",
        ],
        ["INC0010002", "Printer", "jams", "", "Al Gee", "01-03-2026 11:00:00", "Resolved", ""],
        ["INC0010003", "Screen", "dark", "we look", "Al Gee", "2026-03-01", "In Progress", ""],
    ]
    (ticket,), _, aside = read_tickets(write(tmp_path / "sn.csv", [heading, *rows]), PERSONAS, columns=read_map("servicenow"))
    assert ticket.prompt == "VPN drops\nHi, it drops on site. [NAME]"
    assert "Joan" not in ticket.answer
    assert "Piet" not in ticket.answer
    assert (ticket.requester, ticket.created.isoformat()) == ("Joan Marsh", "2026-03-01T10:00:00+00:00")
    assert [q["reason"] for q in aside] == ["has no answer", "is not resolved (state is 'In Progress')"]


def test_jira_takes_the_last_comment_without_its_head(tmp_path, read_tickets):
    heading = ["Summary", "Issue key", "Status", "Reporter", "Created", "Description", "Comment", "Comment", "Comment"]
    row = [
        "Laptop slow",
        "IT-1",
        "Done",
        "Ann Lee",
        "31/Jan/26 2:05 PM",
        "since Monday",
        "31/Jan/26 2:06 PM;5f1;looking",
        "31/Jan/26 3:00 PM;5f1;Remove the old agent",
        "",
    ]
    (ticket,), _, _ = read_tickets(write(tmp_path / "j.csv", [heading, row]), PERSONAS, columns=read_map("jira"))
    assert (ticket.prompt, ticket.answer) == ("Laptop slow\nsince Monday", "Remove the old agent")
    assert (ticket.created.hour, ticket.created.month) == (14, 1)


def test_zendesk_json_leads_into_objects_and_lists(tmp_path, read_tickets):
    row = {
        "subject": "Badge", "description": "does not open", "status": "solved", "created_at": "2026-02-01T09:00:00Z",
        "requester": {"id": 7, "name": "Max Roe", "user_fields": {"title": "Receptionist", "tenure_days": 12}},
        "comments": [{"body": "does not open"}, {"body": "Renewed it, Max."}],
    }  # fmt: skip
    path = tmp_path / "z.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (ticket,), _, _ = read_tickets(path, PERSONAS, columns=read_map("zendesk"))
    assert (ticket.answer, ticket.requester) == ("Renewed it, [NAME].", "7")
    assert (ticket.profile.title, ticket.profile.tenure_days) == ("Receptionist", 12)


def test_parquet_says_the_same_as_csv(tmp_path, read_tickets):
    frame = pandas.DataFrame({"prompt": ["vpn drops", "printer jams", ""], "answer": ["restart it", None, "x"]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    (a, of_a, _), (b, of_b, _) = (read_tickets(tmp_path / f"t.{kind}", PERSONAS) for kind in ("parquet", "csv"))
    assert a == b
    assert of_a.reasons == of_b.reasons == {"has no answer": 1, "has no prompt": 1}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(TicketError, match=r"bad.parquet: is no Parquet file"):
        read_tickets(tmp_path / "bad.parquet", PERSONAS)


def test_a_map_of_ones_own_and_wrong_ones(tmp_path, read_tickets):
    path = write(tmp_path / "t.csv", [["q", "a"], ["vpn drops", "restart it"]])
    (tmp_path / "mine.yaml").write_text("prompt: q\nanswer: [a]\n")
    assert read_tickets(path, PERSONAS, columns=read_map(str(tmp_path / "mine.yaml")))[0][0].prompt == "vpn drops"
    with pytest.raises(TicketError, match=r"has no column short_description \+ description .*its columns are q, a. .*--map"):
        read_tickets(path, PERSONAS, columns=read_map("servicenow"))
    with pytest.raises(ConfigError, match=r"'remedy' is neither a built-in map .*servicenow, jira, zendesk"):
        read_map("remedy")
    (tmp_path / "typo.yaml").write_text("promt: q\nanswer: a\n")
    with pytest.raises(ConfigError, match=r"typo.yaml: (prompt: Field required|promt)"):
        read_map(str(tmp_path / "typo.yaml"))
    (tmp_path / "list.yaml").write_text("- q\n")
    with pytest.raises(ConfigError, match=r"list.yaml: is no map of columns"):
        read_map(str(tmp_path / "list.yaml"))


def test_the_router_assigns_whom_the_file_does_not_name(tmp_path):
    rows = [
        ["prompt", "answer", "persona", "title", "tenure_days"],
        ["my scanner on the truck is dead, no signal at the customer's site", "restart it", "", "Service technician", "900"],
        ["the board pack does not open before the meeting", "sent anew", "", "Chief Financial Officer", "2000"],
        ["vpn drops", "restart it", "admin", "", ""],
        ["write me a poem about the sea and the lonely gulls", "no", "", "", ""],
    ]
    found = import_tickets(write(tmp_path / "t.csv", rows), tmp_path / "out", load_config())
    assert [t.persona for t in found] == ["field", "leadership", "admin"]
    assert found.facts["routed"] == {"field": 1, "leadership": 1}
    assert found.facts["kept_aside"] == {"is no helpdesk request, as the router sees it": 1}


def test_near_duplicates_are_those_a_slow_comparison_finds():
    """The reference: Jaccard likeness of the sets of runs of three words."""
    base = "the monthly report cannot be opened since this morning because excel says that the file is locked by another user on the second floor"
    words = base.split()
    close = " ".join([*words[:-1], "flat"])
    far = " ".join(w if i % 3 else w[::-1] for i, w in enumerate(words))

    def shingles(text):
        w = text.split()
        return {tuple(w[i : i + 3]) for i in range(len(w) - 2)}

    def likeness(a, b):
        return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))

    assert likeness(base, close) > 0.85 > 0.3 > likeness(base, far)
    found = NearDuplicates()
    assert [found.seen(t) for t in (base, far, close, base.upper(), "vpn drops", "vpn drops", "vpn fails")] == [
        False,
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_fifty_thousand_rows_with_five_percent_broken(tmp_path, capsys):
    """Counts are right, and memory does not grow with the file."""
    topics = ("vpn", "printer", "scanner", "mailbox", "badge", "tablet", "router", "headset")

    def rows(n):
        yield ["prompt", "answer", "persona", "requester", "created"]
        for i in range(n):
            own = f"a{i * 7919 % 99991} b{i * 104729 % 99989} c{i * 1299709 % 99971} d{i * 15485863 % 99961}"
            row = [
                f"{topics[i % 8]} {own} does not start since case {i} was closed",
                f"restart {own} and sign in anew",
                PERSONAS[i % 5],
                f"u{i % 999}",
                "2026-01-05",
            ]
            if i % 20 == 0:
                row = [["", *row[1:]], [row[0], "", *row[2:]], [*row[:2], "pirate", *row[3:]], [*row[:4], "yesterday"], [*row, "more", "fields"]][
                    i // 20 % 5
                ]
            yield row

    config = load_config()
    path = tmp_path / "big.csv"
    write(path, rows(5_000))
    import_tickets(path, tmp_path / "small", config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(path, rows(50_000))
    found = import_tickets(path, tmp_path / "out", config)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert (found.facts["rows"], found.facts["used"]) == (50_000, 47_500)
    assert sum(found.facts["kept_aside"].values()) == 2_500 == len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert sorted(found.facts["kept_aside"].values()) == [500] * 5
    assert sum(1 for t in found if t.persona == "field") == len(found.of("field"))
    assert grown_mb < 200, grown_mb
    assert "tickets from big.csv" in capsys.readouterr().err


def test_the_command_says_where_everything_is(tmp_path, capsys):
    write(tmp_path / "t.csv", [["prompt", "answer", "persona"], ["vpn drops", "restart", "field"], ["", "x", "field"]])
    assert main(["tickets", "t.csv", "--out", "out"]) == 0
    done = capsys.readouterr()
    assert "1 of 2 rows used; 1 kept aside (1 has no prompt)" in done.err
    assert "out/quarantine.jsonl" in done.err
    assert "1 field" in done.out
    (tmp_path / "thesis").mkdir()
    assert main(["tickets", "t.csv", "--out", "thesis"]) == 2
    assert main(["tickets", "t.csv", "--out", "out", "--map", "remedy"]) == 2
