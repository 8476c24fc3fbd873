"""Sweeps: which combinations a grid stands for, and that the best of them becomes the version, trained once."""

from __future__ import annotations

import mlflow
import pytest

from persona_models.errors import InputError
from pipelines import sweep
from pipelines.cli import main
from pipelines.sweep import Grid
from router.config import Training, load_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_name_alone_stands_for_multiples_and_keeps_the_ratio_of_alpha_to_rank():
    grid = Grid.read("lr,rank", Training(lr=0.004, rank=16, alpha=32))
    assert {(s.lr, s.rank, s.alpha) for s in grid.settings} == {(lr, r, 2 * r) for lr in (0.002, 0.004, 0.008) for r in (8, 16, 32)}


def test_listed_values_are_taken_as_they_are():
    grid = Grid.read("lr=0.001:0.003, method=lora:dora,seed", Training(seed=5))
    assert len(grid.settings) == 2 * 2 * 3
    assert {(s.lr, s.method) for s in grid.settings} == {(lr, m) for lr in (0.001, 0.003) for m in ("lora", "dora")}
    assert {s.seed for s in grid.settings} == {5, 6, 7}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr,colour", "'colour' cannot be varied; lr, rank,"),
        ("rank=8:many", "rank is 'many'"),
        ("lr=-1", "lr is '-1'"),
        ("rank=" + ":".join(map(str, range(1, 100))), "99 combinations are more than 64"),
    ],
)
def test_what_cannot_be_swept_is_named(text, says):
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        Grid.read(text, Training())


@pytest.fixture
def project(ticket_project):
    lines = [f"scanner {i} is dead,Restart scanner {i} and sync it,u{i % 9}" for i in range(40)]
    settings = "training: {steps: 3, epochs: 1, rows: 4, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 8}\n"
    return ticket_project(settings, ["prompt,answer,requester", *lines])


def sweeping():
    return main(["retrain", "field", "--tickets", "tickets.csv", "--unrouted", "--gates", "gates.yaml", "--sweep", "lr=0.0001:0.03"])


def runs():
    return mlflow.MlflowClient(load_config().registry_uri).search_runs(["1"], order_by=["attributes.start_time"])


def test_the_best_becomes_the_version_and_trains_once(project, monkeypatch, capsys):
    trained = []
    real = sweep.finetune
    monkeypatch.setattr(sweep, "finetune", lambda *a, **k: trained.append(a[2].lr) or real(*a, **k))
    # The process is cut off in its second trial, and started again.
    monkeypatch.setattr(sweep, "persona_row", _dies_once(sweep.persona_row, at=2))
    assert sweeping() == 130
    assert sweeping() == 0
    out = capsys.readouterr().out
    assert trained == [0.0001, 0.03, 0.03]
    tried = [r for r in runs() if r.data.tags["stage"] == "sweep" and r.info.status == "FINISHED"]
    assert [r.data.params["lr"] for r in tried] == ["0.0001", "0.03"]
    best = min(tried, key=lambda r: r.data.metrics["sweep/loss"])
    assert f"best is lr {float(best.data.params['lr']):g}" in out
    (whole,) = (r for r in runs() if r.data.tags["stage"] == "train")
    assert whole.data.params["lr"] == best.data.params["lr"]
    assert {r.data.tags["sweep"] for r in [*tried, whole]} == {whole.data.tags["sweep"]}
    client = mlflow.MlflowClient(load_config().registry_uri)
    # Its curve is that of the trial: nothing was trained again.
    curves = [[m.value for m in client.get_metric_history(r.info.run_id, "train/loss")] for r in (whole, best)]
    assert curves[0] == curves[1]
    assert {f.path for f in client.list_artifacts(whole.info.run_id)} >= {"sweep.json", "plots"}
    assert not (project / "state" / "work" / "field" / "sweep").exists()


def _dies_once(real, at):
    calls = []

    def row(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    return row


def test_a_sweep_is_of_personas_and_not_beside_steps(project, capsys):
    assert main(["retrain", "router", "--sweep", "lr"]) == 2
    assert main(["retrain", "field", "--sweep", "lr", "--steps", "3"]) == 2
    assert main(["retrain", "field", "--sweep", "depth"]) == 2
    assert "'depth' cannot be varied" in capsys.readouterr().err
