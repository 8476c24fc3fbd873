"""The Ray Serve replica around an engine: loads base and adapters, streams token events, takes up new versions, says what it holds.

A change of versions has two steps. `hold` loads what a lineup wants beside what is in force; only when every replica has done so does the front door
ask for the new versions, and `settle` lets go of the old ones. So no request ever meets a replica that has not got what it asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from persona_models.errors import AdapterError, DeskrouteError, RegistryError
from persona_models.heap import keep_loaded
from persona_models.lineup import Ack, Lineup, Pinned
from persona_models.protocol import BUILTIN, Engine, EngineStatus, GenerateRequest, TokenEvent
from persona_models.registry import RegistryReader, model_name, read_lineup

if TYPE_CHECKING:
    from persona_models.adapters import Adapter
    from persona_models.base_model import BaseModel
    from persona_models.engine import PersonaEngine

# A persona without any adapter for the base at hand: its manner comes from the system prompt alone.
NO_ADAPTER = "none"
ONE_AT_A_TIME = "its pool has merge: true and holds one version at a time; promote the version whole, or take merge away"


class PersonaPool:
    """One replica of a pool. Not decorated: `router/app.py` binds it."""

    def __init__(
        self,
        *,
        base: str,
        dtype: str,
        personas: tuple[str, ...],
        manners: dict[str, str],
        engine: str,
        rows: int,
        queue: int,
        threads: int,
        gpu: bool,
        registry_uri: str,
        state: Path,
        merge: bool = False,
        prefix_mb: int = 256,
        guess: bool = True,
        since_ms: int = 0,
    ) -> None:
        self._notes: dict[str, str] = {}
        self.engine: Engine
        self._versions: Versions | None = None
        if engine == "fake":
            from persona_models.fake_engine import FakeEngine

            self.engine = FakeEngine(dict.fromkeys(personas, "fake"))
            return
        import torch

        from persona_models.base_model import load_base
        from persona_models.engine import PersonaEngine

        # The engine's thread alone may use several: see PersonaEngine.
        torch.set_num_threads(1)
        loaded = load_base(base, device="cuda" if gpu else "cpu", dtype=dtype)
        merged = personas[0] if merge and len(personas) == 1 else None
        self.engine = PersonaEngine(
            loaded, manners=manners, max_rows=rows, max_queue=queue, merged=merged, prefix_mb=prefix_mb, guess=guess, threads=threads
        )
        registry = RegistryReader(registry_uri, state / "cache")
        self._versions = Versions(self.engine, loaded, personas, registry)
        lineup, note = read_lineup(registry, personas, state, since_ms=since_ms)
        if note:
            self._notes["registry"] = note
        self._notes |= self._versions.start(lineup, builtin_base=base == BUILTIN)
        keep_loaded()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent | DeskrouteError]:
        """The events of an answer; an error on purpose is the last thing yielded, so that it crosses the process unchanged."""
        try:
            if self._versions and self._versions.behind(request):
                await asyncio.to_thread(self._versions.catch_up, request)
            async for event in self.engine.generate(request):
                yield event
        except DeskrouteError as e:
            yield e

    async def hold(self, lineup: Lineup) -> Ack:
        """Load what the lineup wants beside what is in force. What cannot be loaded is a fault of the reply, and changes nothing."""
        if self._versions is None:
            return Ack(replica_name(), dict(self.engine.status().versions), {}, {})
        return await asyncio.to_thread(self._versions.hold, lineup)

    async def settle(self, lineup: Lineup) -> Ack:
        """Make the lineup's champions current and let go of what it does not want."""
        if self._versions is None:
            return Ack(replica_name(), dict(self.engine.status().versions), {}, {})
        ack = await asyncio.to_thread(self._versions.settle, lineup)
        # What start-up had to say of a persona is over once a version of it was taken up.
        self._notes = {k: v for k, v in self._notes.items() if ack.current.get(k) != lineup.champion(k).version}
        return ack

    async def status(self) -> EngineStatus:
        status = self.engine.status()
        return replace(status, notes=(*status.notes, *self._notes.values()))

    async def check_health(self) -> None:
        status = self.engine.status()
        if not status.ready:
            raise RuntimeError("; ".join(status.notes) or "the engine is closed")


class Versions:
    """The adapter versions of one engine. All methods block; one change at a time."""

    def __init__(self, engine: PersonaEngine, base: BaseModel, personas: tuple[str, ...], registry: RegistryReader) -> None:
        self.engine, self.base, self.personas, self.registry = engine, base, personas, registry
        self.lineup = Lineup()
        self._unfit: dict[str, str] = {}  # persona -> why what ships is not for this base
        self._lock = threading.RLock()

    def start(self, lineup: Lineup, *, builtin_base: bool) -> dict[str, str]:
        """Load the champions, or what ships where one cannot be; returns what there is to say about it by persona."""
        notes = {}
        for persona in self.personas:
            champion = lineup.champion(persona)
            if fault := self._take(persona, champion):
                notes[persona] = f"{persona}: {fault}; serving what ships instead"
                self._take(persona, Pinned())
            if self.engine.status().versions[persona] == NO_ADAPTER:
                notes.setdefault(
                    persona,
                    f"{persona}: no adapter for the base {self.base.name}; its manner comes from the system prompt. Run `deskroute retrain {persona}`",
                )
        if builtin_base:
            notes |= {p: f"{p}: {why}" for p, why in self._unfit.items()}
        self.lineup = lineup
        for persona, trial in lineup.trials.items():
            if persona in self.personas and (fault := self._load(persona, trial.pinned)):
                notes[persona] = f"{persona}: {fault}"
        return notes

    def hold(self, lineup: Lineup) -> Ack:
        """See PersonaPool.hold."""
        with self._lock:
            faults: dict[str, dict[str, str]] = {}
            for persona in self.personas:
                for pinned in lineup.wanted(persona):
                    if fault := self._load(persona, pinned):
                        faults.setdefault(persona, {})[pinned.version] = fault
                if self.engine.merged and persona in lineup.trials:
                    faults.setdefault(persona, {})[lineup.trials[persona].pinned.version] = ONE_AT_A_TIME
            return self._ack(faults)

    def settle(self, lineup: Lineup) -> Ack:
        """See PersonaPool.settle."""
        with self._lock:
            faults: dict[str, dict[str, str]] = {}
            for persona in self.personas:
                champion, *others = lineup.wanted(persona)
                if fault := self._take(persona, champion, [pinned.version for pinned in others]):
                    faults[persona] = {champion.version: fault}
            self.lineup = lineup
            return self._ack(faults)

    def behind(self, request: GenerateRequest) -> bool:
        """Whether a request comes from a front door that knows a newer lineup, and asks for a version that is not here."""
        if request.lineup_ms <= self.lineup.read_ms or self.engine.merged:
            return False
        return any(v not in self.engine.held(p) for p, v in request.versions.items())

    def catch_up(self, request: GenerateRequest) -> None:
        """Load the versions a request names. What cannot be loaded is answered by the current version."""
        with self._lock:
            for persona, version in request.versions.items():
                # Asked for with its digest, so that what was tampered with is refused here too.
                with contextlib.suppress(RegistryError):
                    self._load(persona, (version != BUILTIN and self.registry.pin(model_name(persona), version)) or Pinned())

    def _load(self, persona: str, pinned: Pinned) -> str | None:
        """Hold a version; returns why it cannot be. A merged engine holds one at a time: the version is only checked."""
        if pinned.version in self.engine.held(persona):
            return None
        try:
            version, adapter = self._read(persona, pinned)
            if not self.engine.merged and version not in self.engine.held(persona):
                self.engine.load_adapter(persona, adapter, version, current=False)
        except DeskrouteError as e:
            return e.message
        return None

    def _take(self, persona: str, pinned: Pinned, beside: Collection[str] = ()) -> str | None:
        """Make a version current and let go of all but those beside it; returns why it cannot be."""
        try:
            if pinned.version not in self.engine.held(persona):
                version, adapter = self._read(persona, pinned)
                self.engine.load_adapter(persona, adapter, version, current=self.engine.merged is not None)
            else:
                version = pinned.version
            if not self.engine.merged:
                self.engine.settle(persona, version, beside)
        except DeskrouteError as e:
            return e.message
        return None

    def _read(self, persona: str, pinned: Pinned) -> tuple[str, Adapter]:
        """A version's adapter, checked against the base. For what ships on a base that nothing ships for: no adapter, under a version that says so."""
        from persona_models.adapters import Adapter, builtin_adapter, read_adapter

        if pinned.version != BUILTIN:
            return pinned.version, read_adapter(self.registry.fetch_version(model_name(persona), pinned).folder, self.base)
        try:
            if folder := builtin_adapter(persona):
                return BUILTIN, read_adapter(folder, self.base)
        except AdapterError as e:
            self._unfit[persona] = e.message
        return NO_ADAPTER, Adapter(0, {})

    def _ack(self, faults: Mapping[str, Mapping[str, str]]) -> Ack:
        held = {p: self.engine.held(p) for p in self.personas}
        return Ack(replica_name(), dict(self.engine.status().versions), held, faults)


def replica_name() -> str:
    """Where a replica runs, as an operator would look for it."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def replica_threads(configured: int | None, replicas: int) -> int:
    """torch threads of one replica: as configured, else the machine's cores shared by the replicas."""
    return configured or max(1, (os.cpu_count() or 1) // max(1, replicas))
