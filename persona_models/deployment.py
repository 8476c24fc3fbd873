"""The Ray Serve replica around an engine: loads base and adapters, streams token events, says what it holds."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from persona_models.errors import AdapterError, DeskrouteError, RegistryError
from persona_models.protocol import BUILTIN, Engine, EngineStatus, GenerateRequest, TokenEvent
from persona_models.registry import RegistryReader, model_name

# A persona without any adapter for the base at hand: its manner comes from the system prompt alone.
NO_ADAPTER = "none"


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
        cache: Path,
        merge: bool = False,
    ) -> None:
        self._notes: list[str] = []
        if engine == "fake":
            from persona_models.fake_engine import FakeEngine

            self.engine: Engine = FakeEngine(dict.fromkeys(personas, "fake"))
        else:
            self.engine = self._load(base, dtype, personas, manners, rows, queue, threads, gpu, merge, RegistryReader(registry_uri, cache))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent | DeskrouteError]:
        """The events of an answer; an error on purpose is the last thing yielded, so that it crosses the process unchanged."""
        try:
            async for event in self.engine.generate(request):
                yield event
        except DeskrouteError as e:
            yield e

    async def status(self) -> EngineStatus:
        status = self.engine.status()
        return replace(status, notes=(*status.notes, *self._notes))

    async def check_health(self) -> None:
        status = self.engine.status()
        if not status.ready:
            raise RuntimeError("; ".join(status.notes) or "the engine is closed")

    def _load(
        self,
        base_spec: str,
        dtype: str,
        personas: tuple[str, ...],
        manners: dict[str, str],
        rows: int,
        queue: int,
        threads: int,
        gpu: bool,
        merge: bool,
        registry: RegistryReader,
    ) -> Engine:
        import torch

        from persona_models.adapters import Adapter, builtin_adapter, read_adapter
        from persona_models.base_model import load_base
        from persona_models.engine import PersonaEngine

        # The engine's thread alone may use several: see PersonaEngine.
        torch.set_num_threads(1)
        base = load_base(base_spec, device="cuda" if gpu else "cpu", dtype=dtype)
        engine = PersonaEngine(
            base, manners=manners, max_rows=rows, max_queue=queue, merged=personas[0] if merge and len(personas) == 1 else None, threads=threads
        )
        for persona in personas:
            adapter, version = None, NO_ADAPTER
            try:
                found = registry.fetch(model_name(persona))
                if found:
                    adapter, version = read_adapter(found.folder, base), found.version
            except (RegistryError, AdapterError) as e:
                self._notes.append(f"{persona}: {e.message}; serving what ships instead")
            shipped = builtin_adapter(persona)
            if adapter is None and shipped:
                try:
                    adapter, version = read_adapter(shipped, base), BUILTIN
                except AdapterError as e:
                    if base_spec == BUILTIN:
                        self._notes.append(f"{persona}: {e.message}")
            if adapter is None:
                self._notes.append(
                    f"{persona}: no adapter for the base {base_spec}; its manner comes from the system prompt. Run `deskroute retrain {persona}`"
                )
            engine.load_adapter(persona, adapter or Adapter(0, {}), version)
        return engine


def replica_threads(configured: int | None, replicas: int) -> int:
    """torch threads of one replica: as configured, else the machine's cores shared by the replicas."""
    return configured or max(1, (os.cpu_count() or 1) // max(1, replicas))
