"""Which versions this front door asks for, and how that changes while answers are being made.

registry -> every replica of every pool holds the new versions -> every front door asks for them -> the pools let go of the old ones.
Whatever fails on the way leaves the persona where it was. Knows nothing of HTTP or Ray: a Fleet reaches the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from persona_models.errors import DeskrouteError
from persona_models.lineup import Ack, Lineup, Pinned
from persona_models.registry import RegistryReader
from router.config import Config
from router.desk import Desk
from router.loading import load_router
from router.telemetry import log

RETRY_S = 1.0


class Fleet(Protocol):
    """The replicas behind this front door, and the other front doors. Raises NotReadyError, naming the pool, where a replica does not answer."""

    async def hold(self, lineup: Lineup) -> list[Ack]:
        """Every pool replica loads what the lineup wants, beside what is in force."""
        ...

    async def settle(self, lineup: Lineup) -> list[Ack]:
        """Every pool replica makes the lineup's champions current and lets go of the rest."""
        ...

    async def tell(self, lineup: Lineup) -> int:
        """Every front door, this one too, asks for the lineup's versions from now on; returns how many do."""
        ...


@dataclass(frozen=True)
class Reloaded:
    """What came of a reload. faults: persona or "router" -> why it stays on the version it had."""

    lineup: Lineup
    acks: Sequence[Ack]
    front_doors: int
    router_version: str
    faults: dict[str, str] = field(default_factory=dict)

    def body(self, personas: Sequence[str]) -> dict[str, Any]:
        """As POST /v1/reload says it."""
        trials = {p: {"version": t.pinned.version, "share": t.share, "shadow": t.shadow} for p, t in self.lineup.trials.items()}
        return {
            "object": "deskroute.reload",
            "versions": {p: self.lineup.champion(p).version for p in personas},
            "router_version": self.router_version,
            "trials": trials,
            "front_doors": self.front_doors,
            "replicas": [{"replica": a.replica, "versions": dict(a.current)} for a in self.acks],
            "faults": self.faults,
        }


class Live:
    """Keeps a desk on the versions that the registry says are in force."""

    def __init__(self, config: Config, desk: Desk, fleet: Fleet, lineup: Lineup) -> None:
        self.config, self.desk, self.fleet = config, desk, fleet
        self._wanted = lineup
        self._reader = RegistryReader(config.registry_uri, config.state / "cache")
        self._lock = asyncio.Lock()

    @property
    def settled(self) -> bool:
        """Whether the pools have confirmed the versions that this front door asks for."""
        return self.desk.lineup is not None

    async def start(self) -> None:
        """Agree with the pools on the lineup that start-up found; tries until it succeeds, and answers are made meanwhile."""
        while not self.settled:
            try:
                async with self._lock:
                    lineup, _ = self._possible(self._wanted, Lineup(), await self.fleet.hold(self._wanted))
                    await self.adopt(lineup)
                    await self.fleet.settle(lineup)
                    self._save(lineup)
            except DeskrouteError:
                await asyncio.sleep(RETRY_S)
        with contextlib.suppress(DeskrouteError):
            await asyncio.to_thread(self._reader.warm_up)

    async def reload(self) -> Reloaded:
        """Take up what the registry says now. Raises RegistryError or NotReadyError, having changed nothing, where it or a replica cannot be asked."""
        async with self._lock:
            before = self.desk.lineup or self._wanted
            wanted = await asyncio.to_thread(self._reader.lineup, self.desk.personas)
            faults = {}
            if wanted.router != before.router and self.config.router.artefact == "builtin":
                try:
                    await asyncio.to_thread(load_router, self.config, wanted.router)
                except DeskrouteError as e:
                    faults["router"] = e.message
                    wanted = replace(wanted, router=before.router)
            try:
                lineup, more = self._possible(wanted, before, await self.fleet.hold(wanted))
                front_doors = await self.fleet.tell(lineup)
            except DeskrouteError:
                await self._back_to(before)
                raise
            acks = await self.fleet.settle(lineup)
            self._save(lineup)
            for ack in acks:
                for persona, versions in ack.faults.items():
                    faults.setdefault(persona, "; ".join(f"{ack.replica}: {why}" for why in versions.values()))
            return Reloaded(lineup, acks, front_doors, self.desk.classifier.version, {**faults, **more})

    async def adopt(self, lineup: Lineup) -> None:
        """Ask for a lineup's versions from now on, with its router."""
        if self.desk.lineup and lineup.read_ms < self.desk.lineup.read_ms:
            return
        if self.config.router.artefact == "builtin" and lineup.router.version != self.desk.classifier.version:
            classifier, knowledge = await asyncio.to_thread(load_router, self.config, lineup.router)
            self.desk.take_up(classifier, knowledge)
        self.desk.lineup = lineup

    def _possible(self, wanted: Lineup, before: Lineup, acks: Sequence[Ack]) -> tuple[Lineup, dict[str, str]]:
        """The wanted lineup without what a replica cannot load: such a persona stays on its version, such a trial does not begin."""
        champions, trials, faults = dict(wanted.champions), dict(wanted.trials), {}
        for persona in self.desk.personas:
            for pinned in wanted.wanted(persona):
                why = [f"{a.replica}: {a.faults[persona][pinned.version]}" for a in acks if pinned.version in a.faults.get(persona, ())]
                if not why:
                    continue
                faults[persona] = "; ".join(why)
                if pinned == wanted.champion(persona):
                    champions[persona] = before.champion(persona)
                else:
                    del trials[persona]
        champions = {p: c for p, c in champions.items() if c != Pinned()}
        return replace(wanted, champions=champions, trials=trials), faults

    async def _back_to(self, before: Lineup) -> None:
        try:
            await self.fleet.settle(before)
        except DeskrouteError as e:
            log.warning("after a reload that failed: %s", e.message)

    def _save(self, lineup: Lineup) -> None:
        try:
            lineup.save(self.config.state)
        except OSError as e:
            log.warning("the versions in force could not be written down: %s", e.strerror)
