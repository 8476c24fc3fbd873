"""Versions change while people are being answered: real Ray Serve with two replicas and two front doors, a real MLflow store, `deskroute promote`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from serving.running import ROOT, Server, descendants

from persona_models.adapters import WEIGHTS, builtin_adapter
from persona_models.registry import CHAMPION, RegistryReader
from pipelines.promote import Promoter
from pipelines.tracking import PERSONA_EXPERIMENT, Tracker
from router.config import load_config

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
CLIENTS, SWAPS = 8, 10
CONFIG = """
pools: [{name: personas, replicas: 2, rows: 8}]
http: {replicas: 2}
"""


def variant(folder: Path, scale: float) -> Path:
    """The shipped field adapter, made stronger: it answers in other words."""
    shutil.copytree(builtin_adapter("field"), folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v * scale if "lora_B" in k else v for k, v in tensors.items()}, folder / WEIGHTS)
    return folder


def register(state: Path, folder: Path, model: str = "deskroute-field") -> str:
    tracker = Tracker(f"sqlite:///{state / 'mlflow.db'}", state / "artifacts")
    with tracker.run(PERSONA_EXPERIMENT, "made by hand", tags={"persona": "field"}, params={}) as run:
        return tracker.register(run, model, folder, metrics={"eval/loss": 0.1}, about="", description="Passed every gate.", tags={})


def is_replica(pid: int) -> bool:
    try:
        return "pool-personas" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


class Live:
    """A server, its state folder, and the `deskroute` command on it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.versions = [register(self.state, variant(folder / f"v{i}", scale)) for i, scale in enumerate((0.2, 2.0), 1)]
        broken = variant(folder / "broken", float("nan"))
        self.broken = register(self.state, broken)
        self.server = Server(folder, config=CONFIG)
        self.server.wait()
        self.url = f"http://127.0.0.1:{self.server.port}"

    @property
    def promoter(self) -> Promoter:
        return Promoter(load_config().model_copy(update={"state": self.state}))

    def deskroute(self, *argv: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"PYTHONPATH": str(ROOT), "DESKROUTE_HOME": str(self.state)}
        command = [sys.executable, "-m", "pipelines.cli", *argv]
        return subprocess.run(command, env=env, cwd=self.state.parent, capture_output=True, text=True, check=False)

    def ask(self, text: str, **more: object) -> tuple[str, str]:
        """(version that answered, the answer) of a streamed request; raises where it does not end with a finish reason and [DONE]."""
        body = {"model": "field", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 16} | more
        version, said, finished, last = "", [], None, ""
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                if last == "[DONE]":
                    break
                chunk = json.loads(last)
                assert "error" not in chunk, chunk
                version = chunk["deskroute"]["versions"]["field"] if "deskroute" in chunk else version
                said.append(chunk["choices"][0]["delta"].get("content") or "")
                finished = chunk["choices"][0]["finish_reason"] or finished
        assert last == "[DONE]"
        assert finished
        return version, "".join(said)

    def listed(self) -> str:
        return {m["id"]: m.get("version") for m in httpx.get(f"{self.url}/v1/models").json()["data"]}["field"]

    def memory_mb(self) -> float:
        """Proportional set size of the server's processes."""
        total = 0
        for pid in {self.server.process.pid, *descendants(self.server.process.pid)}:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        return total / 1024


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    live = Live(tmp_path_factory.mktemp("live"))
    try:
        yield live
    finally:
        if live.server.process.poll() is None:
            live.server.stop()


QUESTIONS = ["My VPN keeps dropping at the customer's site", "the printer in the van does not print", "I cannot sign in on the tablet"]


def test_ten_swaps_under_eight_clients(live):
    """No failed request, no answer of two versions, every replica acknowledged, and what the server says agrees with what it does."""
    reference: dict[str, dict[str, str]] = {}
    for version in live.versions:
        done = live.deskroute("promote", "field", version)
        assert done.returncode == 0, done.stderr
        assert "live on 2 replicas" in done.stdout
        reference[version] = {q: live.ask(q)[1] for q in QUESTIONS}
        assert {live.ask(q)[0] for q in QUESTIONS} == {version}
    assert all(reference[live.versions[0]][q] != reference[live.versions[1]][q] for q in QUESTIONS)

    stop, faults, answers = threading.Event(), [], []

    def client(i: int) -> None:
        n = 0
        while not stop.is_set():
            question = QUESTIONS[(i + n) % len(QUESTIONS)]
            n += 1
            try:
                version, text = live.ask(question)
            except Exception as e:
                faults.append(repr(e))
                continue
            answers.append(version)
            if text != reference[version][question]:
                faults.append(f"an answer of {version} is not {version}'s: {text!r}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    memory = []
    try:
        for n in range(SWAPS):
            # As `deskroute promote` and `rollback` do it, without starting Python ten times.
            other = next(v for v in live.versions if v != live.listed())
            moved = live.promoter.roll_back("field") if n % 3 == 2 else live.promoter.promote("field", other)
            want = moved.now
            assert moved.reply.acknowledged("field") == "2 replicas"
            assert moved.reply.front_doors == 2
            # From here on nobody may get another version, whichever front door and replica answers.
            assert {live.listed() for _ in range(2)} == {want}
            assert {live.ask(QUESTIONS[k % 3])[0] for k in range(3)} == {want}
            # Reading it takes seconds of a busy machine.
            if n in (0, SWAPS - 1):
                memory.append(live.memory_mb())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults[:3]
    assert len(answers) > SWAPS
    assert set(answers) == set(live.versions)
    print(f"{len(answers)} answers; memory after the first and the last swap, MB: {[round(m) for m in memory]}")
    assert memory[-1] <= 1.05 * memory[0]


def test_a_broken_version_is_said_and_changes_nothing(live):
    assert live.deskroute("promote", "field", live.versions[0]).returncode == 0
    done = live.deskroute("promote", "field", live.broken)
    assert done.returncode == 1
    assert "holds values that are not finite" in done.stderr
    assert "the aliases are as they were" in done.stderr
    assert "Traceback" not in done.stderr
    registry = RegistryReader(f"sqlite:///{live.state / 'mlflow.db'}", live.state / "cache")
    assert registry.aliases("deskroute-field")[CHAMPION] == live.versions[0] == live.listed() == live.ask(QUESTIONS[0])[0]


def test_a_killed_replica_comes_up_on_the_version_in_force(live):
    """Also where somebody has moved the alias meanwhile without telling the server: all replicas answer alike."""
    assert live.deskroute("promote", "field", live.versions[1]).returncode == 0
    tracker = Tracker(f"sqlite:///{live.state / 'mlflow.db'}", live.state / "artifacts")
    tracker.promote("deskroute-field", live.versions[0], live.versions[1])
    replicas = [pid for pid in descendants(live.server.process.pid) if is_replica(pid)]
    assert len(replicas) == 2
    os.kill(replicas[0], 9)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = [pid for pid in descendants(live.server.process.pid) if is_replica(pid)]
        if len(now) == 2 and replicas[0] not in now and httpx.get(f"{live.url}/readyz").status_code == 200:
            break
        time.sleep(0.5)
    else:
        raise AssertionError("the replica did not come back")
    time.sleep(3)
    assert {live.ask(QUESTIONS[k % 3], seed=k)[0] for k in range(12)} == {live.versions[1]}


def test_rolling_back_takes_seconds(live):
    assert live.deskroute("promote", "field", live.versions[0]).returncode == 0
    assert live.deskroute("promote", "field", live.versions[1]).returncode == 0
    began = time.monotonic()
    done = live.deskroute("rollback", "field")
    print(f"rollback took {time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    assert live.ask(QUESTIONS[0])[0] == live.versions[0]


def test_a_registry_that_is_gone_takes_nothing_down(live):
    """The store's file is away, and then damaged: the server says so and answers as before."""
    store = live.state / "mlflow.db"
    before = live.ask(QUESTIONS[0])
    saved = store.read_bytes()
    store.write_bytes(b"this is no database" * 1000)
    try:
        answer = httpx.post(f"{live.url}/v1/reload", timeout=60)
        assert answer.status_code == 503
        assert "cannot be re" in answer.json()["error"]["message"]
        assert live.ask(QUESTIONS[0]) == before
        done = live.deskroute("rollback", "field")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    finally:
        store.write_bytes(saved)


def test_sigterm_ends_cleanly_and_leaves_nothing_behind(live):
    """Last in the file: it stops the shared server. Ray's core would end the process with a trace."""
    scratch = live.server.scratch
    assert scratch
    live.server.stop_as_a_supervisor()
    assert live.server.process.returncode == 0, live.server.log.read_text()
    assert "deskroute: stopping" in live.server.log.read_text()
    assert "SIGTERM received" not in live.server.log.read_text()
    assert not [folder for folder in scratch if folder.exists()]
