"""pipelines/mixture.py: the summary against a plain count, and a study from a router and adapters to its rows, picture and run."""

import numpy as np
import pytest

from persona_models.errors import InputError
from pipelines.bench import bench
from pipelines.mixture import BASE, LEADING, MARGINS, RIGHT, SAMPLES_PER_PERSONA, summary
from pipelines.tracking import ROUTER_EXPERIMENT, Tracker
from router.config import load_config
from router.policy import shares

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_the_summary_groups_by_margin_and_counts_who_is_better():
    random = np.random.default_rng(3)
    margin = np.array([0.0, 0.05, 0.12, 0.3, 0.99, 1.0])
    hit = np.array([True, False, True, True, True, False])
    losses = {way: random.random(6) for way in (LEADING, RIGHT, BASE, "mixture", "mixture, sharpness 2")}
    rows = summary(margin, hit, losses)
    assert [(r["margin"], r["requests"]) for r in rows] == [("0 to 0.12", 2), ("0.12 to 0.25", 1), ("0.25 to 0.5", 1), ("0.75 to 1", 2)]
    first, last = rows[0], rows[-1]
    assert (first["leading is right"], last["leading is right"]) == (0.5, 0.5)
    change = losses["mixture"] - losses[LEADING]
    assert first["change"] == pytest.approx(change[:2].mean(), abs=1e-4)
    assert last["change"] == pytest.approx(change[4:].mean(), abs=1e-4)
    assert first["mixture is better"] == pytest.approx((change[:2] < 0).mean())
    assert first["from"] <= first["change"] <= first["to"]
    assert MARGINS[0] == 0.0
    assert MARGINS[-1] == 1.0


def test_shares_are_probabilities_to_a_power():
    two = {"field": 0.6, "admin": 0.3}
    assert shares(two) == pytest.approx({"field": 2 / 3, "admin": 1 / 3})
    assert shares(two, 2.0) == pytest.approx({"field": 0.8, "admin": 0.2})
    assert shares(two, 0.0) == pytest.approx({"field": 0.5, "admin": 0.5})


def test_a_study_is_drawn_tabled_and_logged(tmp_path, long_base_folder, empty_store, monkeypatch, capsys):
    """On a base without adapters every way is the base: no difference, and all of it written down."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "mlflow.db").write_bytes(empty_store.read_bytes())
    (tmp_path / "deskroute.yaml").write_text(f"base: {long_base_folder}\nstate: state\ntraining: {{max_tokens: 4096}}\n")
    monkeypatch.setattr("pipelines.mixture.SAMPLES_PER_PERSONA", 2)
    assert SAMPLES_PER_PERSONA >= 50
    config = load_config(tmp_path / "deskroute.yaml")
    bench("mixture", tmp_path / "m.json", config)
    assert "leading is right" in capsys.readouterr().out
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    tracker = Tracker(config.registry_uri, config.state / "artifacts")
    run = tracker.client.search_runs([tracker.experiment(ROUTER_EXPERIMENT)])[0]
    assert run.data.tags["stage"] == "study"
    changes = [v for k, v in run.data.metrics.items() if k.startswith("study/change")]
    assert changes
    assert set(changes) == {0}
    (tmp_path / "personas.yaml").write_text("- {id: field, title: Field, who: all, manner: plain, colour: '#1c7c54'}\n")
    (tmp_path / "deskroute.yaml").write_text(f"base: {long_base_folder}\nstate: state\npersonas: personas.yaml\n")
    with pytest.raises(InputError, match="takes two personas, the catalogue has 1"):
        bench("mixture", None, load_config(tmp_path / "deskroute.yaml"))
    assert {f.path for f in tracker.client.list_artifacts(run.info.run_id)} >= {"mixture.json", "mixture_requests.json", "plots"}
