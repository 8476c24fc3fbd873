"""A retraining whose process is killed with SIGKILL at five places, and a promotion at two: running the command again finishes it, and nothing is
there twice, half done or left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from persona_models.registry import CHALLENGER, CHAMPION, DIGEST_TAG, PREVIOUS, RegistryReader
from pipelines.cli import main
from router.config import load_config

pytestmark = [pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parent.parent.parent
# Runs `deskroute` with a client whose named method ends the process by SIGKILL once it has done its work, or a loop that does so at a step.
DRIVER = """
import os, signal, sys
where, argv = sys.argv[1], sys.argv[2:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where.startswith("step"):
    import pipelines.training as training
    mean, n = training.token_loss, [0]
    def loss(*args, **more):
        n[0] += 1
        if n[0] == int(where.split()[1]):
            die()
        return mean(*args, **more)
    training.token_loss = loss
elif where != "nowhere":
    from mlflow import MlflowClient
    name, _, alias = where.partition(" ")
    whole = getattr(MlflowClient, name)
    def method(self, *args, **more):
        done = whole(self, *args, **more)
        if not alias or alias in args:
            die()
        return done
    setattr(MlflowClient, name, method)
from pipelines.cli import main
sys.exit(main(argv))
"""


@pytest.fixture
def project(tmp_path, long_base_folder):
    training = "training: {patience: 0, rows: 2, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 4}\n"
    (tmp_path / "deskroute.yaml").write_text(f"base: {long_base_folder}\n{training}")
    (tmp_path / "gates.yaml").write_text("persona: []\nrouter: []\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    lines = [f"scanner {i} on the truck is dead,Restart scanner {i} and sync it,u{i % 7},field" for i in range(28)]
    (tmp_path / "tickets.csv").write_text("\n".join(["prompt,answer,requester,persona", *lines]))
    return tmp_path


def deskroute(project: Path, where: str, *argv: str, here: bool = True, **more: str) -> int:
    # MLflow writes its store into the environment of the process that uses it.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"PYTHONPATH": str(ROOT), **more}
    if where == "nowhere" and here:
        return main([*argv])
    command = [sys.executable, "driver.py", where, *argv]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, check=False).returncode


RETRAIN = ("retrain", "field", "--tickets", "tickets.csv", "--steps", "30", "--gates", "gates.yaml")


@pytest.mark.parametrize(
    "where",
    ["create_run", "step 25", "create_logged_model", "create_model_version", "set_registered_model_alias champion"],
    ids=lambda w: w.replace(" ", "-"),
)
def test_a_killed_retraining_is_finished_by_the_next(project, where):
    assert deskroute(project, where, *RETRAIN) == -signal.SIGKILL
    assert deskroute(project, "nowhere", *RETRAIN) == 0
    config = load_config()
    client = mlflow.MlflowClient(config.registry_uri, config.registry_uri)
    experiment = client.get_experiment_by_name("deskroute-personas").experiment_id
    runs = client.search_runs([experiment])
    assert [r.info.status for r in runs] == ["FINISHED"]
    versions = client.search_model_versions("name = 'deskroute-field'")
    assert [(str(v.version), v.status, v.run_id) for v in versions] == [("1", "READY", runs[0].info.run_id)]
    assert [str(m.status).rpartition(".")[2] for m in client.search_logged_models([experiment])] == ["READY"]
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    assert reader.aliases("deskroute-field") == {CHAMPION: "1"}
    assert reader.fetch("deskroute-field").version == "1"
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(30))
    if where == "step 25":
        # As if it had not been killed: the same weights, to the bit.
        other = project / "other"
        assert deskroute(project, "nowhere", *RETRAIN, here=False, DESKROUTE_HOME=str(other)) == 0
        undisturbed = mlflow.MlflowClient(f"sqlite:///{other / 'mlflow.db'}", f"sqlite:///{other / 'mlflow.db'}")
        assert undisturbed.get_model_version("deskroute-field", "1").tags[DIGEST_TAG] == versions[0].tags[DIGEST_TAG]


def test_a_killed_promotion_is_finished_by_the_next(project):
    assert deskroute(project, "nowhere", *RETRAIN) == 0
    assert deskroute(project, "nowhere", *RETRAIN, "--no-promote", "--seed", "12") == 0
    config = load_config()
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    assert reader.aliases("deskroute-field") == {CHAMPION: "1", CHALLENGER: "2"}
    for where in ("set_registered_model_alias previous", "set_registered_model_alias champion"):
        assert deskroute(project, where, "promote", "field", "2") == -signal.SIGKILL
        # Whatever was done of it, the champion is a whole version.
        assert reader.fetch("deskroute-field").version in ("1", "2")
        assert deskroute(project, "nowhere", "promote", "field", "2") == 0
        assert reader.aliases("deskroute-field") == {CHAMPION: "2", PREVIOUS: "1"}
        assert deskroute(project, "nowhere", "rollback", "field") == 0
        assert reader.aliases("deskroute-field") == {CHAMPION: "1"}
