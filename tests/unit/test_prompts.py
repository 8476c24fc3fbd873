"""A company's own labels: from a CSV of ticket groups to a router that serves them; and what a bad file says."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import yaml
from unit import corpora

from persona_models.errors import InputError, TicketError
from persona_models.personas import read_personas
from persona_models.registry import CHAMPION, ROUTER_MODEL, RegistryReader
from pipelines.cli import main
from pipelines.promote import GATES_FILE
from pipelines.prompts import check_labels, label_id, read_prompts
from router.classifier import PersonaClassifier
from router.config import load_config
from router.query import Query

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GROUPS = {
    "Network & VPN": ["vpn tunnel", "wifi signal", "gateway", "dns name", "firewall rule"],
    "Printing": ["printer queue", "toner", "paper jam", "scanner glass", "label roll"],
    "Accounts": ["password", "login", "badge access", "permission", "locked account"],
    "SAP": ["invoice posting", "cost centre", "purchase order", "payroll run", "booking key"],
}


def write_csv(path, n=240, groups=GROUPS):
    pick = random.Random(3)
    lines = ["Short description,Assignment group,Caller"]
    for i in range(n):
        group = list(groups)[i % len(groups)]
        lines.append(f"the {pick.choice(groups[group])} in room {i} has stopped,{group},person {i % 60}")
    path.write_text("\n".join(lines))
    return path


def test_columns_and_labels_are_understood_and_people_held_out_whole(tmp_path):
    rows = read_prompts(write_csv(tmp_path / "p.csv"))
    assert {r.persona for r in rows} == {"network_vpn", "printing", "accounts", "sap"}
    held = {r.voice.removeprefix("held_") for r in rows if r.held_out}
    assert held
    assert not held & {r.voice for r in rows if not r.held_out}
    assert 0.05 < sum(r.held_out for r in rows) / len(rows) < 0.3
    # A file that grows keeps the same people apart.
    more = read_prompts(write_csv(tmp_path / "q.csv", n=480))
    assert held == {r.voice.removeprefix("held_") for r in more if r.held_out}
    assert label_id("2nd level: Apps") == "group_2nd_level_apps"


def test_jsonl_with_profiles(tmp_path):
    rows = [{"text": f"request {i}", "persona": p, "title": "Clerk", "tenure_days": 3} for i in range(30) for p in ("field", "admin")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_prompts(tmp_path / "p.jsonl")
    assert (found[0].profile.title, found[0].profile.tenure_days) == ("Clerk", 3)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", "colour,shape\nred,round\n", "has no column with the texts; name it one of text, prompt.*It has colour, shape"),
        ("p.csv", "text,shape\nred,round\n", "has no column with the labels"),
        ("p.csv", "text,label\n" + "a b,one\n" * 30, "this file has only 'one'"),
        ("p.csv", "text,label\n", "no usable row"),
        ("p.csv", "text,label\n" + "a b,one\n" * 30 + "c d,two\n", r"fewer than 20 rows of two \(1\)"),
        ("p.jsonl", "{broken\n", "cannot be read"),
        ("p.txt", "x", "none of .csv, .tsv, .jsonl, .parquet"),
        ("p.csv", "text,label,tenure_days\n" + "a b,one,soon\n" * 30, "row 1: tenure_days is 'soon'"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(TicketError, match=says):
        read_prompts(tmp_path / name)
    with pytest.raises(TicketError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.csv")


def test_labels_that_are_no_personas_get_a_catalogue_proposed(tmp_path):
    rows = read_prompts(write_csv(tmp_path / "p.csv"))
    with pytest.raises(
        InputError, match=r"network_vpn, .* are no personas of the catalogue .* set `personas: .*` in deskroute.yaml and run this again"
    ):
        check_labels(rows, read_personas(), tmp_path / "made" / "personas.yaml")
    made = read_personas(tmp_path / "made" / "personas.yaml")
    assert {p.id for p in made} == {"network_vpn", "printing", "accounts", "sap"}
    assert len({p.colour for p in made}) == 4
    check_labels(rows, made, tmp_path / "unused.yaml")
    with pytest.raises(InputError, match="there are no rows of sap"):
        check_labels([r for r in rows if r.persona != "sap"], made, tmp_path / "unused.yaml")


def test_from_a_csv_of_groups_to_a_champion_that_routes_them(tmp_path, empty_store, capsys, monkeypatch):
    """With the shipped corpus made small: what is a request, and the articles, still come from it."""
    (tmp_path / "state").mkdir()
    shutil.copy(empty_store, tmp_path / "state")
    write_csv(tmp_path / "p.csv")
    monkeypatch.setattr("pipelines.retrain.CORPUS", corpora.write_corpus(tmp_path / "corpus"))
    monkeypatch.setattr("pipelines.retrain.read_personas", lambda: [type("P", (), {"id": p}) for p in corpora.PERSONAS])
    # All that the shipped gates look at is measured; only their bars are for more than a tiny corpus.
    shipped = yaml.safe_load(GATES_FILE.read_text())
    (tmp_path / "gates.yaml").write_text(
        yaml.safe_dump({"persona": [], "router": [{"metric": g["metric"], "at_least": -9} for g in shipped["router"]]})
    )
    assert main(["retrain", "router", "--prompts", "p.csv", "--gates", "gates.yaml"]) == 2
    err = capsys.readouterr().err
    catalogue = tmp_path / "state" / "work" / "router" / "personas.yaml"
    assert str(catalogue) in err
    (tmp_path / "deskroute.yaml").write_text(f"personas: {catalogue}\n")
    assert main(["retrain", "router", "--prompts", "p.csv", "--gates", "gates.yaml"]) == 0
    assert "router: version 1 is champion" in capsys.readouterr().out
    config = load_config()
    found = RegistryReader(config.registry_uri, config.state / "cache").fetch(ROUTER_MODEL, CHAMPION)
    classifier = PersonaClassifier.load(found.folder, tuple(p.id for p in config.catalogue()))
    for text, group in (("the payroll run has stopped", "sap"), ("wifi signal in the hall", "network_vpn"), ("toner is empty", "printing")):
        scores = classifier.score([Query(text)])[0]
        assert max(scores.personas, key=lambda p: scores.personas[p]) == group
    assert main(["route", "toner is empty again, please help with the paper jam"]) == 0
    assert json.loads(capsys.readouterr().out)["persona"] in ("printing", None)


def test_prompts_are_the_routers(capsys):
    assert main(["retrain", "field", "--prompts", "p.csv"]) == 2
    assert "--prompts retrains the router" in capsys.readouterr().err
