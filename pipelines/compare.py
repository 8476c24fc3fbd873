"""Champions and challengers side by side, and the MLflow UI that shows them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import quote

from persona_models.errors import InputError, WorkError
from persona_models.registry import CHALLENGER, CHAMPION, ROUTER_MODEL, SHADOW, RegistryReader, VersionFacts, model_name
from pipelines.tracking import PERSONA_EXPERIMENT, WORKFLOW
from router.config import Config
from router.feedback import open_for_reading

# Two measurements of one adapter on the same answers differ by less.
SAME_LOSS = 1e-5
SHOWN = ("eval/loss", "eval/gain", "eval/ends", "eval/carried", "eval/grounded")


def compare(config: Config, metric: str, ui: str) -> None:
    """Print the table and the URL. Raises InputError for a metric that no version has."""
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    if reader.empty:
        print(f"no model is registered at {config.registry_uri}; every persona is served by what ships. Run `deskroute retrain all`")
        return
    runs: list[str] = []
    known: set[str] = set()
    columns = list(dict.fromkeys([metric, *SHOWN]))
    lines = []
    for name in [*(p.id for p in config.catalogue()), "router"]:
        model = ROUTER_MODEL if name == "router" else model_name(name)
        aliases, versions = reader.aliases(model), reader.versions(model)
        champion, challenger = versions.get(aliases.get(CHAMPION, "")), versions.get(aliases.get(CHALLENGER, ""))
        known |= {m for v in versions.values() for m in v.metrics}
        if not versions:
            lines.append(f"{name:<18}{'builtin':<12}")
            continue
        for role, facts in ((CHAMPION, champion), (CHALLENGER, challenger)):
            if facts:
                lines.append(_line(name, role, facts, columns, champion if role == CHALLENGER else None, metric))
                if name != "router" and facts.run_id:
                    runs.append(facts.run_id)
        if not champion:
            lines.append(f"{name:<18}{'builtin':<12}{CHAMPION:<12}")
        if others := [v for v in versions if v not in (aliases.get(CHAMPION), aliases.get(CHALLENGER))]:
            lines.append(f"{name:<18}{', '.join(sorted(others, key=int))}: registered as well; `deskroute promote {name} VERSION`")
    if known and metric not in known:
        raise InputError(f"--metric: no version has {metric!r}; there are {', '.join(sorted(m for m in known if m.startswith('eval/')))}")
    print(
        f"{'model':<18}{'version':<12}{'role':<12}{'registered':<18}"
        + "".join(f"{c.removeprefix('eval/'):>10}" for c in columns)
        + "   against champion"
    )
    print("\n".join(lines))
    for line in _in_use(config, reader):
        print(line)
    experiment = reader.experiment_id(PERSONA_EXPERIMENT)
    if experiment:
        where = config.registry_uri if config.registry_uri.startswith("http") else ui
        print(f"\n`deskroute ui`, then charts of every run:\n  {runs_url(where, experiment)}")
        if len(runs) > 1:
            print(f"these versions in columns:\n  {columns_url(where, experiment, runs)}")


def _in_use(config: Config, reader: RegistryReader) -> list[str]:
    """How the versions of personas with a challenger on trial fare with people, a line each."""
    store = open_for_reading(config.feedback_url)
    lines = []
    for persona in config.catalogue():
        how = reader.trial(model_name(persona.id))
        if how and store:
            lines.append(f"\n{persona.id}, {'in the shadow' if how == SHADOW else how.replace('canary', 'canary of') + ' %'}:")
            beside = None if how == SHADOW else reader.aliases(model_name(persona.id)).get(CHALLENGER)
            lines += [f"  {result}" for result in store.results(persona.id, beside=beside).values()] or ["  nobody has asked yet"]
    return lines


def runs_url(ui: str, experiment: str) -> str:
    """The chart view of the personas' training runs."""
    chosen = quote("tags.stage = 'train'")
    return f"{ui}/#/experiments/{experiment}/runs?compareRunsMode=CHART&{WORKFLOW}&searchFilter={chosen}"


def columns_url(ui: str, experiment: str, runs: list[str]) -> str:
    """The compare page of some runs."""
    listed = ",".join(f'"{r}"' for r in runs)
    return f"{ui}/#/compare-runs?runs={quote(f'[{listed}]')}&experiments={quote(f'[{chr(34)}{experiment}{chr(34)}]')}&{WORKFLOW}"


def _line(name: str, role: str, facts: VersionFacts, columns: list[str], champion: VersionFacts | None, metric: str) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.created / 1000))
    cells = "".join(f"{facts.metrics[c]:>10.3f}" if c in facts.metrics else f"{'-':>10}" for c in columns)
    delta = ""
    if champion and metric in champion.metrics and metric in facts.metrics:
        delta = f"   {facts.metrics[metric] - champion.metrics[metric]:+.3f}"
        measured = facts.metrics.get("eval/champion_loss")
        if (
            metric == "eval/loss"
            and "eval/delta_low" in facts.metrics
            and measured is not None
            and abs(measured - champion.metrics[metric]) < SAME_LOSS
        ):
            # Measured when it was trained, both on the same answers; against another champion it says nothing.
            delta += f" (95 %: {facts.metrics['eval/delta_low']:+.3f} to {facts.metrics['eval/delta_high']:+.3f})"
    return f"{name:<18}{facts.version:<12}{role:<12}{when:<18}{cells}{delta}"


def run_ui(config: Config, port: int) -> None:
    """Run the MLflow server on the registry in force, with settings that start in seconds, until Ctrl-C."""
    uri = config.registry_uri
    if uri.startswith("http"):
        print(f"the registry is a server already; open {uri}")
        return
    config.state.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise InputError(f"127.0.0.1:{port} cannot be used ({e.strerror}); choose another with --port") from None
    # Four workers and a job runner, MLflow's defaults, take 55 s to start and 1.7 GB on two cores.
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--default-artifact-root", (config.state / "artifacts").as_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    reader = RegistryReader(uri, config.state / "cache")
    experiment = reader.experiment_id(PERSONA_EXPERIMENT)
    url = f"http://127.0.0.1:{port}"
    print(f"MLflow on {uri}\n  {runs_url(url, experiment) if experiment else url + '/#/?' + WORKFLOW}", flush=True)
    # In a session of its own, so that whoever stops this process stops the server's workers as well, by Ctrl-C or SIGTERM.
    server = subprocess.Popen(command, env=env, start_new_session=True)

    def asked(*_: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, asked) for s in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        code = server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    if code:
        raise WorkError(f"MLflow's server ended with code {code}; what it said is above")
