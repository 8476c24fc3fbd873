"""`deskroute nightly` on a tiny base and a tiny corpus: what is done, what is skipped, where a way ends, and what the report says."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from unit import corpora

from persona_models.personas import SHIPPED
from persona_models.registry import CHALLENGER, CHAMPION, ROUTER_MODEL, RegistryReader
from pipelines import nightly
from pipelines.cli import main
from pipelines.promote import Promoter
from router.config import load_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MODELS = ("router", "tickets", *corpora.PERSONAS)
SHUT = "persona:\n  - {metric: eval/ends, at_least: 2}\nrouter: []\n"


@pytest.fixture
def project(tmp_path, long_base_folder, empty_store):
    """Three personas, of whom admin has too few tickets."""
    (tmp_path / "state").mkdir()
    shutil.copy(empty_store, tmp_path / "state")
    corpora.write_corpus(tmp_path / "corpus")
    shipped = Path(nightly.__file__).parent / "corpus"
    shutil.copytree(shipped / "manner", tmp_path / "corpus" / "manner")
    shutil.copy(shipped / "router" / "follow_ups.yaml", tmp_path / "corpus" / "router")
    known = [p for p in yaml.safe_load(SHIPPED.read_text()) if p["id"] in corpora.PERSONAS]
    (tmp_path / "personas.yaml").write_text(yaml.safe_dump(known))
    rows = ["prompt,answer,persona,requester"]
    rows += [
        f"the vpn tunnel {i} of the {p} drops,Restart the client {i} of the {p},{p},{p}{i % 7}" for p in ("leadership", "field") for i in range(30)
    ]
    rows += [f"the printer {i} is stuck,Open tray {i},admin,a{i}" for i in range(5)]
    (tmp_path / "export.csv").write_text("\n".join(rows))
    (tmp_path / "gates.yaml").write_text("persona: []\nrouter: []\n")
    (tmp_path / "deskroute.yaml").write_text(
        f"base: {long_base_folder}\npersonas: personas.yaml\ncorpus: corpus\nnightly: {{tickets: export.csv}}\n"
        "training: {steps: 3, epochs: 1, rows: 8, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 4}\n"
    )
    return tmp_path


def night(*more: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and by model its stages with their states."""
    code = main(["nightly", "--gates", "gates.yaml", *more])
    report = json.loads((load_config().state / "reports" / "nightly.json").read_text())
    return code, {m["name"]: {s["name"]: s["state"] for s in m["stages"]} for m in report["models"]}


def aliases(name: str) -> dict[str, str]:
    config = load_config()
    return RegistryReader(config.registry_uri, config.state / "cache").aliases(ROUTER_MODEL if name == "router" else f"deskroute-{name}")


def test_the_whole_way_then_only_what_has_changed(project, monkeypatch, capsys):
    code, ways = night()
    assert code == 0
    assert list(ways) == list(MODELS)
    assert ways == {
        "router": {"train": "done", "promote": "done"},
        "tickets": {"import": "done"},
        "leadership": {"train": "done", "promote": "done"},
        "field": {"train": "done", "promote": "done"},
        "admin": {"train": "waiting"},
    }
    assert [aliases(n).get(CHAMPION) for n in ("router", "leadership", "field", "admin")] == ["1", "1", "1", None]
    report = capsys.readouterr().out
    assert report.startswith("# Deskroute, ")
    assert ": 4 done, 1 waiting" in report.splitlines()[0]
    assert "only 5 usable tickets of the persona admin" in report
    assert (load_config().state / "reports" / "nightly.md").read_text() == report.rstrip("\n") + "\n"

    # The second night: a new ticket of field's, all else as it was. What does not change is not even started.
    trained = []
    real = nightly.Retraining.persona
    monkeypatch.setattr(nightly.Retraining, "persona", lambda self, name, *a, **k: trained.append(name) or real(self, name, *a, **k))
    monkeypatch.setattr(nightly.Retraining, "router", lambda *a, **k: pytest.fail("the router's corpus is the same"))
    with (project / "export.csv").open("a") as file:
        file.write("\nthe tablet in the van stays dark,Charge it for an hour and hold the button,field,f99")
    code, ways = night()
    assert (code, trained) == (0, ["field"])
    assert ways["router"] == ways["leadership"] == {"train": "unchanged", "promote": "unchanged"}
    assert ways["tickets"] == {"import": "done"}
    assert ways["field"] == {"train": "done", "promote": "done"}
    assert (aliases("leadership")[CHAMPION], aliases("field")[CHAMPION]) == ("1", "2")

    # The third: nothing. What somebody rolled back by hand stays so.
    assert main(["rollback", "field"]) == 0
    code, ways = night()
    assert (code, trained) == (0, ["field"])
    assert {state for stages in ways.values() for state in stages.values()} == {"unchanged", "waiting"}
    assert aliases("field")[CHAMPION] == "1"


def test_a_shut_gate_ends_that_way_alone_until_the_gate_opens(project, capsys):
    config = load_config()
    (project / "gates.yaml").write_text(SHUT)
    code, ways = night()
    assert code == 1
    assert ways["router"] == {"train": "done", "promote": "done"}
    assert ways["leadership"] == ways["field"] == {"train": "done", "promote": "stopped"}
    assert aliases("field") == {CHALLENGER: "1"}
    out, err = capsys.readouterr()
    assert "stopped: eval/ends is 0, must be at least 2" in out
    assert "2 stopped" in err
    # Nobody is woken twice for the same.
    code, ways = night()
    assert (code, ways["field"]) == (0, {"train": "unchanged", "promote": "unchanged"})
    with pytest.raises(Exception, match="failed gates"):
        Promoter(config).promote("field", "1")
    # A gate that opens promotes what is there, without training it again.
    (project / "gates.yaml").write_text("persona: []\nrouter: []\n")
    code, ways = night()
    assert (code, ways["field"]) == (0, {"train": "unchanged", "promote": "done"})
    assert aliases("field") == {CHAMPION: "1"}


def test_tickets_that_cannot_be_read_stop_the_personas_and_not_the_router(project, capsys):
    (project / "export.csv").write_text("colour,shape\nred,round\n")
    code, ways = night()
    assert code == 1
    assert ways["router"]["promote"] == "done"
    assert ways["tickets"] == {"import": "failed"}
    assert ways["leadership"] == ways["field"] == ways["admin"] == {"train": "stopped"}
    assert "Traceback" not in capsys.readouterr().err


def test_a_version_on_trial_is_left_alone(project):
    assert night()[0] == 0
    assert main(["retrain", "field", "--tickets", "export.csv", "--seed", "5", "--no-promote", "--gates", "gates.yaml"]) == 0
    assert main(["promote", "field", "2", "--shadow"]) == 0
    assert main(["retrain", "field", "--tickets", "export.csv", "--seed", "6", "--no-promote", "--gates", "gates.yaml"]) == 0
    assert aliases("field") == {CHAMPION: "1", CHALLENGER: "2"}
    (project / "deskroute.yaml").write_text((project / "deskroute.yaml").read_text().replace("rank: 2", "rank: 4"))
    code, ways = night()
    assert (code, ways["field"], ways["leadership"]) == (0, {"train": "waiting"}, {"train": "done", "promote": "done"})
    assert aliases("field") == {CHAMPION: "1", CHALLENGER: "2"}


class _Hook(http.server.BaseHTTPRequestHandler):
    got: ClassVar[list] = []
    status = 200

    def do_POST(self):
        self.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_the_report_is_posted_and_says_so_where_it_cannot_be(project, monkeypatch, capsys):
    (project / "export.csv").write_text("colour,shape\nred,round\n")
    server = http.server.HTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DESKROUTE_REPORT_URL", f"http://127.0.0.1:{server.server_port}/secret")
    monkeypatch.setattr(nightly.Retraining, "router", lambda *a, **k: (_ for _ in ()).throw(nightly.DeskrouteError("no")))
    assert night()[0] == 1
    (posted,) = _Hook.got
    assert posted["text"].startswith("# Deskroute, ")
    assert posted["report"]["ok"] is False
    monkeypatch.setattr(_Hook, "status", 500)
    assert night()[0] == 1
    server.shutdown()
    server.server_close()
    err = capsys.readouterr().err
    assert "the report could not be posted (HTTP 500)" in err
    assert "secret" not in err


def test_prompts_for_the_router_that_are_not_there_end_its_way_alone(project):
    text = (project / "deskroute.yaml").read_text().replace("nightly: {tickets: export.csv}", "nightly: {tickets: export.csv, prompts: nowhere.csv}")
    (project / "deskroute.yaml").write_text(text)
    code, ways = night()
    assert code == 1
    assert ways["router"] == {"train": "failed"}
    assert ways["leadership"] == {"train": "done", "promote": "done"}
    report = json.loads((load_config().state / "reports" / "nightly.json").read_text())
    assert "nowhere.csv: there is no such file" in report["models"][0]["stages"][0]["said"]
