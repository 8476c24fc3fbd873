"""The ticket's way with a real MLflow store, real peft and a tiny real base: from a CSV file to the version that serving resolves."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import mlflow
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_models.adapters import CARD, read_adapter
from persona_models.base_model import load_base
from persona_models.errors import ConfigError, InputError, RegistryError, TicketError
from persona_models.gated_lora import LoraBank
from persona_models.registry import CHALLENGER, CHAMPION, DIGEST_TAG, PREVIOUS, RegistryReader, VersionFacts
from pipelines import compare
from pipelines.cli import main
from pipelines.model_card import shade
from pipelines.promote import Gate, Promoter, faults, read_gates
from pipelines.tracking import ROLLED_BACK_TAG
from router.config import load_config

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SLICED = Gate(metric="eval/loss", slice="length", against="champion", at_most=1.2)


@pytest.fixture
def project(ticket_project):
    """A project with tickets of several people, two of whose rows are broken or tell of somebody."""
    lines = [f"scanner {i} on the truck is dead,Restart scanner {i} and sync it,u{i % 9},2026-01-{1 + i % 28:02d}" for i in range(40)]
    lines += [",broken row,,", "mail ann@example.org,call +44 20 7946 0123,u1,2026-01-01"]
    settings = "training: {steps: 3, epochs: 1, rows: 4, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 8}\n"
    return ticket_project(settings, ["prompt,answer,requester,created", *lines])


@pytest.fixture
def retrained(project):
    assert main(["retrain", "field", "--tickets", "tickets.csv", "--gates", "gates.yaml"]) == 0
    return project


def reader() -> RegistryReader:
    config = load_config()
    return RegistryReader(config.registry_uri, config.state / "cache")


def test_from_tickets_to_a_registered_champion(retrained, long_base_folder, capsys):
    config = load_config()
    found = reader().fetch("deskroute-field")
    assert found.version == "1"
    client = mlflow.MlflowClient(config.registry_uri, config.registry_uri)
    version = client.get_model_version("deskroute-field", "1")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["persona"] == "field"
    assert run.data.tags["mlflow.runColor"] == "#1b7837"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == int(run.data.params["steps"])
    judged = ("loss", "ppl", "gain", "base_loss", "ends", "carried", "grounded", "chrf", "rougeL", "refusals", "tokens", "ms_per_token", "delta_low")
    assert {f"eval/{m}" for m in judged} <= set(run.data.metrics)
    assert any(m.startswith("slice/length_") for m in run.data.metrics)
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"field-train", "deskroute-eval"}
    files = {f.path for f in client.list_artifacts(run.info.run_id)} | {f.path for f in client.list_artifacts(run.info.run_id, "plots")}
    assert {"eval_samples.json", "eval_slices.json", "plots/loss.png"} <= files
    assert {t["path"] for t in json.loads(run.data.tags["mlflow.loggedArtifacts"])} == {"eval_samples.json", "eval_slices.json"}
    assert version.tags[DIGEST_TAG]
    base = load_base(str(long_base_folder), device="cpu")
    adapter = read_adapter(found.folder, base)
    assert adapter.rank == 2
    train = [json.loads(line)["answer"] for line in (load_config().state / "work" / "field" / "dataset" / "train.jsonl").read_text().splitlines()]
    said = [base.tokenizer.decode(phrase, skip_special_tokens=True) for phrase in adapter.phrases._phrases]
    assert said
    assert all(any(phrase in answer for answer in train) for phrase in said)


def test_the_dataset_keeps_broken_rows_aside_and_holds_no_personal_data(retrained):
    folder = load_config().state / "work" / "field" / "dataset"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train"] + manifest["validation"] > 40
    aside = (load_config().state / "work" / "tickets" / "quarantine.jsonl").read_text()
    assert "has no prompt" in aside
    text = aside + "".join((folder / f"{name}.jsonl").read_text() for name in ("train", "validation", "watch"))
    assert "ann@example.org" not in text
    assert "7946" not in text


def test_our_adapter_loads_in_plain_peft_with_the_same_logits(retrained, long_base_folder):
    folder = reader().fetch("deskroute-field").folder
    assert json.loads((folder / CARD).read_text())["persona"] == "field"
    ids = torch.arange(30).unsqueeze(0)
    base = load_base(str(long_base_folder), device="cpu")
    adapter = read_adapter(folder, base)
    with torch.inference_mode():
        want = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(long_base_folder), folder).eval()(input_ids=ids).logits
        bank = LoraBank(base.model)
        bank.load("a", adapter.rank, adapter.factors)
        bank.gate.rows = bank.open([{"a": 1.0}])
        torch.testing.assert_close(base.model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


def test_the_base_is_left_as_it_was(project, long_base_folder):
    before = load_base(str(long_base_folder), device="cpu").digest
    assert main(["retrain", "field", "--gates", "gates.yaml", "--steps", "2"]) == 0
    assert load_base(str(long_base_folder), device="cpu").digest == before


def test_promote_and_roll_back_move_the_aliases(retrained, capsys):
    assert main(["retrain", "field", "--no-promote", "--gates", "gates.yaml", "--steps", "2"]) == 0
    assert reader().aliases("deskroute-field") == {CHAMPION: "1", CHALLENGER: "2"}
    assert main(["compare"]) == 0
    table = capsys.readouterr().out
    assert "champion" in table
    assert "challenger" in table
    assert "compareRunsMode=CHART&workflowType=machine_learning" in table
    assert main(["promote", "field", "2"]) == 0
    assert reader().aliases("deskroute-field") == {CHAMPION: "2", PREVIOUS: "1"}
    assert reader().fetch("deskroute-field").version == "2"
    assert main(["rollback", "field"]) == 0
    assert reader().aliases("deskroute-field") == {CHAMPION: "1"}
    capsys.readouterr()
    assert main(["compare"]) == 0
    assert "2: registered as well; `deskroute promote field VERSION`" in capsys.readouterr().out
    moved = Promoter(load_config()).roll_back("field")
    assert (moved.before, moved.now, moved.reply) == ("1", "builtin", None)
    assert reader().fetch("deskroute-field") is None
    with pytest.raises(InputError, match="has no champion to roll back from"):
        Promoter(load_config()).roll_back("field")


def test_a_version_says_what_it_is_and_loses_the_mark_of_a_rollback(retrained):
    promoter = Promoter(load_config())
    client = promoter.tracker.client
    page = client.get_model_version("deskroute-field", "1").description
    assert page.startswith("Passed every gate.")
    assert "| loss |" in page
    assert "| this version | base | what it is |" in page
    run = client.get_run(client.get_model_version("deskroute-field", "1").run_id)
    assert run.info.run_name.startswith("field-v1-r")
    assert run.data.tags["mlflow.runColor"] == next(p.colour for p in load_config().catalogue() if p.id == "field")
    promoter.roll_back("field")
    assert ROLLED_BACK_TAG in client.get_model_version("deskroute-field", "1").tags
    promoter.promote("field", "1")
    assert ROLLED_BACK_TAG not in client.get_model_version("deskroute-field", "1").tags


def test_versions_have_shades_of_their_personas_colour():
    assert shade("#2166ac", 1) == shade("#2166ac", 6) == "#2166ac"
    assert len({shade("#2166ac", version) for version in range(1, 6)}) == 5


def test_the_interval_is_shown_only_against_the_champion_it_was_measured_against():
    def line(champion_loss):
        metrics = {"eval/loss": 0.1, "eval/delta_low": -0.02, "eval/delta_high": -0.01, "eval/champion_loss": champion_loss}
        champion = VersionFacts("1", None, 0, {"eval/loss": 0.12}, "")
        return compare._line("field", "challenger", VersionFacts("2", None, 0, metrics, ""), ["eval/loss"], champion, "eval/loss")

    assert line(0.12).endswith("-0.020 (95 %: -0.020 to -0.010)")
    assert line(0.13).endswith("-0.020")


def test_the_ui_says_at_once_that_its_port_is_taken(project, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["ui", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be used (Address already in use); choose another with --port" in capsys.readouterr().err


def test_a_version_that_fails_a_gate_stays_challenger_and_says_why(project, capsys):
    (project / "shut.yaml").write_text("persona: [{metric: eval/loss, against: base, at_most: 0.01}]\n")
    assert main(["retrain", "admin", "--gates", "shut.yaml", "--steps", "2"]) == 0
    assert "challenger (eval/loss / base's is" in capsys.readouterr().out
    assert reader().aliases("deskroute-admin") == {CHALLENGER: "1"}
    assert reader().fetch("deskroute-admin") is None
    assert reader().versions("deskroute-admin")["1"].description.startswith("Failed gates: eval/loss / base's is")


def test_a_damaged_copy_is_fetched_again(retrained):
    folder = reader().fetch("deskroute-field").folder
    sound = (folder / CARD).read_text()
    (folder / CARD).write_text("{}")
    assert (reader().fetch("deskroute-field").folder / CARD).read_text() == sound


def test_what_was_tampered_with_after_registration_is_never_promoted(retrained, capsys):
    assert main(["retrain", "field", "--no-promote", "--gates", "gates.yaml", "--steps", "2"]) == 0
    card = max((load_config().state / "artifacts").rglob(CARD), key=lambda p: p.stat().st_mtime)
    card.write_text("{}")
    capsys.readouterr()
    assert main(["promote", "field", "2"]) == 1
    assert "version 2 is not what was registered" in capsys.readouterr().err
    assert reader().aliases("deskroute-field") == {CHAMPION: "1", CHALLENGER: "2"}
    with pytest.raises(RegistryError, match="is not what was registered"):
        reader().fetch("deskroute-field", CHALLENGER)


def test_an_empty_registry_costs_nothing_and_holds_nothing():
    config = load_config()
    assert reader().empty
    assert reader().fetch("deskroute-field") is None
    assert not config.state.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["retrain", "pirate"], "'pirate' is neither router nor a persona; known are leadership"),
        (["retrain", "field", "--tickets", "none.csv"], "none.csv: cannot be read"),
        (["retrain", "field", "--tickets", "few.csv"], "only 2 usable tickets of the persona field; at least 20"),
        (["retrain", "field", "--method", "magic"], "training.method: 'magic' cannot share a batch"),
        (["retrain", "field", "--steps", "0"], "--steps is 0"),
        (["retrain", "router", "--tickets", "tickets.csv"], "the router learns from the corpus"),
        (["retrain", "field", "--gates", "none.yaml"], "none.yaml: cannot be read"),
        (["promote", "field", "9"], "deskroute-field has no version 9; it has none yet"),
        (["promote", "pirate", "1"], "'pirate' is neither router nor a persona"),
        (["route"], "give either a TEXT or --jsonl FILE"),
        (["route", " "], "give either text or messages"),
        (["pretrain", "--steps", "0"], "--steps is 0"),
        (["route", "vpn", "--profile", "Director"], "'Director' is not KEY=VALUE"),
        (["route", "vpn", "--profile", "tenure_days=many"], "tenure_days"),
        (["route", "--jsonl", "bad.jsonl"], "bad.jsonl, line 2: is not valid JSON"),
        (["--config", "x"], "usage"),
        (["serve", "--config", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_sentence(project, capsys, argv, says):
    (project / "few.csv").write_text("prompt,answer,persona\nvpn drops on site,b,field\nscanner broken in the van,d,field\n")
    (project / "bad.jsonl").write_text('{"id": 1, "text": "vpn"}\n{oops\n')
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    config = load_config()
    assert not (config.state / "mlflow.db").exists() or reader().versions("deskroute-field") == {}


def test_ask_streams_an_answer_and_says_how_it_was_routed(project, capsys):
    (project / "deskroute.yaml").write_text("generation: {engine: fake}\n")
    assert main(["ask", "My VPN keeps dropping at the customer's site, no Wi-Fi here", "--profile", "title=Technician"]) == 0
    done = capsys.readouterr()
    assert done.out.startswith("[field] About the VPN connection.")
    assert "[persona: field" in done.err
    assert "article: VPN connection" in done.err


def test_route_says_the_same_whatever_is_decided(project, capsys):
    """A mixture needs no engine to be told."""
    (project / "deskroute.yaml").write_text("policy: {min_known: 0.0, mix_margin: 1.0, mix_floor: 0.0}\n")
    assert main(["route", "my vpn does not connect"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "mix"


def test_route_explains_itself_to_people(project, capsys, monkeypatch):
    text = "the payrol run fails and the van is late"
    assert main(["route", text, "--explain", "--profile", "title=Payroll clerk"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("persona: admin")
    assert "a request at all:" in out
    # Words are marked by what they say, also those with a slip in them.
    assert "payrol+" in out
    assert "van-" in out
    assert 'title "payroll"' in out
    assert "\x1b[" not in out
    assert main(["route", "--jsonl", "x", "--explain"]) == 2


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_trained(project, capsys):
    (project / "file").write_text("")
    assert main(["retrain", "field", "--steps", "2", "--export", "file/out"]) == 2
    assert "cannot be made (Not a directory)" in capsys.readouterr().err


def test_folders_that_hold_something_else_are_not_replaced(project, capsys):
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").write_text("years of work")
    assert main(["pretrain", "--out", "mine"]) == 2
    (project / "out" / "field").mkdir(parents=True)
    (project / "out" / "field" / "thesis.txt").write_text("years of work")
    assert main(["retrain", "field", "--export", "out"]) == 2
    assert (project / "mine" / "thesis.txt").exists()
    assert (project / "out" / "field" / "thesis.txt").exists()
    assert "would be replaced; give another folder" in capsys.readouterr().err


def test_route_file_answers_line_by_line(project, capsys):
    (project / "in.jsonl").write_text(
        '{"id": "a", "text": "vpn drops"}\n\n{"id": 2, "messages": [{"role": "user", "content": "printer"}], "profile": {"title": "Driver"}}\n'
    )
    assert main(["route", "--jsonl", "in.jsonl", "--out", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in (project / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["a", 2]
    assert all(abs(sum(r["scores"].values()) - 1) < 1e-3 for r in rows)


@pytest.mark.parametrize(
    ("gate", "metrics", "rivals", "fault"),
    [
        (Gate(metric="m", at_least=0.5), {"m": 0.6}, {}, None),
        (Gate(metric="m", at_least=0.5), {"m": 0.4}, {}, "m is 0.4, must be at least 0.5"),
        (Gate(metric="m", at_most=1.0, against="base"), {"m": 2.0}, {"base": {"m": 1.0}}, "m / base's is 2, may be at most 1"),
        (Gate(metric="m", at_most=1.0, against="champion"), {"m": 2.0}, {}, None),
        (Gate(metric="m", at_most=1.0), {"m": float("nan")}, {}, "m is nan, may be at most 1"),
        (Gate(metric="m", at_most=1.0), {}, {}, "m was not measured"),
        (SLICED, {"slice/length_short_loss": 1.1, "slice/tenure_new_loss": 9.0}, {"champion": {"slice/length_short_loss": 1.0}}, None),
        (
            SLICED,
            {"slice/length_short_loss": 1.3, "slice/length_long_loss": 1.0},
            {"champion": {"slice/length_short_loss": 1.0, "slice/length_long_loss": 1.0}},
            "slice/length_short_loss / champion's is 1.3, may be at most 1.2",
        ),
        # No kind had enough held-out answers.
        (SLICED, {"eval/loss": 9.0}, {}, None),
    ],
)
def test_gates(gate, metrics, rivals, fault):
    assert faults((gate,), metrics, rivals) == ([fault] if fault else [])


def test_the_shipped_gates_load_and_a_typo_is_named(tmp_path):
    assert read_gates().persona
    path = tmp_path / "gates.yaml"
    path.write_text("persona: [{metrik: eval/loss, at_most: 1}]\n")
    with pytest.raises(ConfigError, match=r"gates.yaml: persona.0.metri"):
        read_gates(path)
    path.write_text("persona: [{metric: eval/ends, slice: length, at_least: 0.5}]\n")
    with pytest.raises(ConfigError, match="only eval/loss is measured by kind of request"):
        read_gates(path)
    path.write_text("persona: [{metric: eval/loss}]\n")
    with pytest.raises(ConfigError, match="exactly one of at_most and at_least"):
        read_gates(path)


def test_tickets_of_one_person_cannot_be_judged(project):
    (project / "one.csv").write_text("prompt,answer,requester\n" + "".join(f"p{i},a{i},me\n" for i in range(30)))
    assert main(["retrain", "field", "--tickets", "one.csv"]) == 2


def test_promoting_what_does_not_exist_changes_nothing():
    with pytest.raises(InputError):
        Promoter(load_config()).promote("field", "1")
    assert issubclass(TicketError, InputError)
