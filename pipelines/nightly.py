"""`deskroute nightly`: tickets, then for the router and every persona: retrain, judge, register, gates, promotion, live; at the end a report.

A stage whose input digest is that of the last time is skipped; a shut gate ends a model's way, and the others go on. Made for cron: it can be killed at
any moment and started again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_models.errors import DeskrouteError, TicketError, registry_fault
from persona_models.registry import CHAMPION, RegistryReader
from pipelines.compare import runs_url
from pipelines.dataset import check_tickets
from pipelines.imports import Imported, file_digest, import_tickets
from pipelines.night_report import Report, Way
from pipelines.promote import Promoter, faults, read_gates, registered_model, verdict_on
from pipelines.retrain import Retraining, alone
from pipelines.tickets import read_map
from pipelines.tracking import PERSONA_EXPERIMENT, Tracker
from router.config import Config
from router.loading import lineup_in_force

TICKETS = "tickets"
# Where `deskroute ui` is, unless it is told otherwise.
UI = "http://127.0.0.1:5000"


class Ledger:
    """What each stage was made from and what came of it, kept between nights; written after the stage, so that a killed one is done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Without it everything is done once more.
            self._entries = {}

    def known(self, name: str, stage: str, inputs: str) -> dict[str, Any] | None:
        """What came of a stage, if it was made from the same."""
        found = self._entries.get(f"{name}/{stage}")
        return found if found and found["inputs"] == inputs else None

    def write(self, name: str, stage: str, inputs: str, said: str, **facts: Any) -> None:
        self._entries[f"{name}/{stage}"] = {"inputs": inputs, "said": said, "at": time.strftime("%Y-%m-%d %H:%M"), **facts}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


class Nightly:
    """One night. again: also do what has not changed."""

    def __init__(self, config: Config, *, gates: Path | None = None, server: str | None = None, again: bool = False) -> None:
        self.config, self.server, self.again = config, server, again
        self.gates, self._gates_file = read_gates(gates), gates
        # Read before the night begins, so that a fault of the arguments is one of the command.
        self.columns = read_map(config.nightly.map)
        self.folder = config.state / "work" / "nightly"
        self.registry = RegistryReader(config.registry_uri, config.state / "cache")

    def run(self, out: Path) -> Report:
        """Walk the whole way; the report is written to `out` and sent, whatever happened. Raises WorkError where another night is still going on."""
        report = Report(datetime.now().astimezone())
        with alone(self.folder, "nightly"):
            self.ledger = Ledger(self.folder / "ledger.json")
            try:
                self._walk(report)
            finally:
                report.finish()
                report.write(out)
                if self.config.nightly.report_url:
                    report.send(self.config.nightly.report_url)
                    report.write(out)
        return report

    def _walk(self, report: Report) -> None:
        names = [p.id for p in self.config.catalogue()]
        # The router first: it says whose ticket is whose, and its articles stand in the prompts.
        self._each(report, "router", lambda way: self._model(way, None))
        tickets: Imported | None = None
        if self.config.nightly.tickets:
            way = self._each(report, TICKETS, self._tickets)
            if way.state == "failed":
                for name in names:
                    report.way(name).add("train", "stopped", "the tickets cannot be read")
                return
            tickets = Imported(self.folder / TICKETS)
        for name in names:
            self._each(report, name, lambda way: self._model(way, tickets))
        experiment = None if self.registry.empty else self.registry.experiment_id(PERSONA_EXPERIMENT)
        if experiment:
            uri = self.config.registry_uri
            report.link = runs_url(uri if uri.startswith("http") else UI, experiment)

    def _each(self, report: Report, name: str, walk: Callable[[Way], None]) -> Way:
        """One model's way; its faults end that way alone."""
        way = report.way(name)
        try:
            walk(way)
        except DeskrouteError as e:
            way.add(way.at or "train", "failed", e.message)
        except Exception as e:
            way.add(way.at or "train", "failed", registry_fault(e) or f"unexpected {type(e).__name__}")
            if registry_fault(e) is None and not isinstance(e, OSError):
                raise
        return way

    def _tickets(self, way: Way) -> None:
        asked = self.config.nightly
        path = Path(str(asked.tickets))
        with way.stage("import") as stage:
            try:
                content = file_digest(path)
            except OSError as e:
                raise TicketError(f"{path}: cannot be read ({e.strerror})") from None
            router = self.config.router.artefact, lineup_in_force(self.config).router.version
            columns = self.columns.model_dump(mode="json") if self.columns else None
            inputs = _digest(content, columns, asked.encoding, asked.region, router, [p.id for p in self.config.catalogue()])
            known = self._known(TICKETS, "import", inputs)
            if known and (self.folder / TICKETS).is_dir():
                stage.state, stage.said = "unchanged", f"since {known['at']}: {known['said']}"
                return
            found = import_tickets(path, self.folder / TICKETS, self.config, columns=self.columns, encoding=asked.encoding, region=asked.region)
            stage.said = str(found)
            self.ledger.write(TICKETS, "import", inputs, str(found))

    def _model(self, way: Way, tickets: Imported | None) -> None:
        """train (with judging and registering), then promote."""
        name, model = way.name, registered_model(self.config, way.name)
        with way.stage("train") as stage:
            if not self.registry.empty and (how := self.registry.trial(model)):
                stage.state, stage.said = "waiting", f"a version is on trial ({how}); promote it or roll it back"
                return
            if tickets:
                try:
                    check_tickets(tickets.of(name), name)
                except TicketError as e:
                    stage.state, stage.said = "waiting", e.message
                    return
            # The personas' has the articles of the router that has just been promoted.
            work = self._retraining() if name == "router" else self._personas
            prompts = self.config.nightly.prompts if name == "router" else None
            inputs = work.inputs(name, tickets, prompts)
            known = self._known(name, "train", inputs)
            if known and (self.registry.empty or self.registry.pin(model, known["version"]) is None):
                known = None
            if known:
                stage.state, stage.said = "unchanged", f"since {known['at']}"
                way.version, way.metrics, rivals = known["version"], known["metrics"], known["rivals"]
            else:
                made = work.router(promote=False, prompts=prompts) if name == "router" else work.persona(name, tickets, promote=False, steps=None)
                stage.said = f"version {made.version}"
                way.version, way.metrics, rivals = made.version, made.metrics, made.rivals
                self.ledger.write(name, "train", inputs, stage.said, version=made.version, metrics=made.metrics, rivals=made.rivals)
        with way.stage("promote") as stage:
            gates = self.gates.router if name == "router" else self.gates.persona
            inputs = _digest(way.version, [g.model_dump(mode="json") for g in gates])
            if known and (decided := self._known(name, "promote", inputs)):
                stage.state, stage.said = "unchanged", f"since {decided['at']}: {decided['said']}"
                return
            champion = self.registry.aliases(model).get(CHAMPION)
            failed = faults(gates, way.metrics, rivals)
            if known:
                self._redescribe(model, way.version, failed)
            if failed:
                stage.state, stage.said = "stopped", "; ".join(failed)
            elif champion and int(champion) > int(way.version):
                stage.state, stage.said = "waiting", f"version {champion}, which is newer, is champion"
            else:
                moved = Promoter(self.config, self.server).promote(name, way.version)
                stage.said = f"version {way.version} is champion (before: {moved.before}), {moved.live or 'no server runs here'}"
            self.ledger.write(name, "promote", inputs, stage.said)

    def _retraining(self) -> Retraining:
        return Retraining(self.config, gates=self._gates_file, server=self.server)

    @cached_property
    def _personas(self) -> Retraining:
        return self._retraining()

    def _known(self, name: str, stage: str, inputs: str) -> dict[str, Any] | None:
        return None if self.again else self.ledger.known(name, stage, inputs)

    def _redescribe(self, model: str, version: str, failed: list[str]) -> None:
        """The gates were changed since the version was registered, and its description says how it did at the former ones."""
        Tracker(self.config.registry_uri, self.config.state / "artifacts").describe(model, version, verdict_on(failed))


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
