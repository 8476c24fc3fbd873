"""A retraining whose process is killed with SIGKILL at five places, and a promotion at two: running the command again finishes it, and nothing is
there twice, half done or left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from persona_models.registry import CHALLENGER, CHAMPION, DIGEST_TAG, PREVIOUS, RegistryReader
from router.config import load_config

pytestmark = [pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parent.parent.parent
# A process that has imported everything and forks for every command, since importing takes longer than the commands. A line on its input is
# [folder, state, where to die, arguments]; the answer is the exit status of the fork, as subprocess gives it. It dies by SIGKILL when a named method of
# MLflow's client has done its work, or at a step of training.
DRIVER = """
import json, os, signal, sys
import mlflow, peft, torch, transformers
from mlflow import MlflowClient
import pipelines.retrain, pipelines.training as training
from pipelines.cli import main

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(where):
    if where.startswith("step"):
        mean, n = training.token_loss, [0]
        def loss(*args, **more):
            n[0] += 1
            if n[0] == int(where.split()[1]):
                die()
            return mean(*args, **more)
        training.token_loss = loss
    elif where != "nowhere":
        name, _, alias = where.partition(" ")
        whole = getattr(MlflowClient, name)
        def method(self, *args, **more):
            done = whole(self, *args, **more)
            if not alias or alias in args:
                die()
            return done
        setattr(MlflowClient, name, method)

for line in sys.stdin:
    folder, state, where, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ["DESKROUTE_HOME"] = state
        arm(where)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(main(argv))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    """A function (folder, where to die, *arguments, state=) -> exit status of a `deskroute` command in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DESKROUTE_"))} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", DRIVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def deskroute(folder: Path, where: str, *argv: str, state: Path | None = None) -> int:
        process.stdin.write(json.dumps([str(folder), str(state or folder / "state"), where, argv]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield deskroute
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def project(ticket_project):
    lines = [f"scanner {i} on the truck is dead,Restart scanner {i} and sync it,u{i % 7},field" for i in range(28)]
    settings = "training: {patience: 0, rows: 2, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 4}\n"
    return ticket_project(settings, ["prompt,answer,requester,persona", *lines])


RETRAIN = ("retrain", "field", "--tickets", "tickets.csv", "--steps", "30", "--gates", "gates.yaml")


@pytest.mark.parametrize(
    "where",
    ["create_run", "step 25", "create_logged_model", "create_model_version", "set_registered_model_alias champion"],
    ids=lambda w: w.replace(" ", "-"),
)
def test_a_killed_retraining_is_finished_by_the_next(project, driver, empty_store, where):
    assert driver(project, where, *RETRAIN) == -signal.SIGKILL
    assert driver(project, "nowhere", *RETRAIN) == 0
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
        other.mkdir()
        shutil.copy(empty_store, other)
        assert driver(project, "nowhere", *RETRAIN, state=other) == 0
        undisturbed = mlflow.MlflowClient(f"sqlite:///{other / 'mlflow.db'}", f"sqlite:///{other / 'mlflow.db'}")
        assert undisturbed.get_model_version("deskroute-field", "1").tags[DIGEST_TAG] == versions[0].tags[DIGEST_TAG]


def test_a_killed_promotion_is_finished_by_the_next(project, driver):
    assert driver(project, "nowhere", *RETRAIN) == 0
    assert driver(project, "nowhere", *RETRAIN, "--no-promote", "--seed", "12") == 0
    config = load_config()
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    assert reader.aliases("deskroute-field") == {CHAMPION: "1", CHALLENGER: "2"}
    for where in ("set_registered_model_alias previous", "set_registered_model_alias champion"):
        assert driver(project, where, "promote", "field", "2") == -signal.SIGKILL
        # Whatever was done of it, the champion is a whole version.
        assert reader.fetch("deskroute-field").version in ("1", "2")
        assert driver(project, "nowhere", "promote", "field", "2") == 0
        assert reader.aliases("deskroute-field") == {CHAMPION: "2", PREVIOUS: "1"}
        assert driver(project, "nowhere", "rollback", "field") == 0
        assert reader.aliases("deskroute-field") == {CHAMPION: "1"}
