"""Which adapter versions an engine holds: persona -> version -> slot of the bank, and how many rows still need each slot.

A version that is no longer wanted leaves the bank when its last row has ended. Used by the model's thread; only `versions` and `held` are read by others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from persona_models.adapters import Adapter
from persona_models.gated_lora import LoraBank
from persona_models.lookup import Phrases


class AdapterSlots:
    """The slots of one bank. `versions`: persona -> its current version."""

    def __init__(self, bank: LoraBank) -> None:
        self._bank = bank
        self.versions: dict[str, str] = {}
        self._slots: dict[str, dict[str, str]] = {}
        self._uses: dict[str, int] = {}
        self._phrases: dict[str, Phrases] = {}
        self._loads = 0

    def held(self, persona: str) -> tuple[str, ...]:
        """The versions of a persona that requests can have."""
        return tuple(self._slots.get(persona, ()))

    def load(self, persona: str, adapter: Adapter, version: str, *, current: bool) -> None:
        """Put a version into a slot; as the current one it takes the place of all others."""
        self._loads += 1
        slot = f"{persona}#{self._loads}"
        self._bank.load(slot, adapter.rank, adapter.factors)
        self._uses[slot] = 0
        self._phrases[slot] = adapter.phrases
        slots = self._slots.setdefault(persona, {})
        old = slots.get(version)
        slots[version] = slot
        if old:
            self._release(old)
        if current:
            self.settle(persona, version)

    def settle(self, persona: str, version: str, beside: Collection[str] = ()) -> None:
        """Make a held version the current one; let go of all others but those beside it."""
        self.versions[persona] = version
        slots = self._slots[persona]
        for other in [v for v in slots if v != version and v not in beside]:
            self._release(slots.pop(other))

    def unload(self, persona: str) -> None:
        """Let go of every version of a persona."""
        self.versions.pop(persona, None)
        for slot in self._slots.pop(persona, {}).values():
            self._release(slot)

    def take(self, gate: Mapping[str, float], wanted: Mapping[str, str]) -> tuple[dict[str, str], dict[str, float]]:
        """(persona -> version, slot -> weight) for a row that begins now: the version that is wanted where it is held, else the current one."""
        versions = {p: wanted[p] if wanted.get(p) in self._slots[p] else self.versions[p] for p in gate}
        slots = {self._slots[p][versions[p]]: w for p, w in gate.items()}
        for slot in slots:
            self._uses[slot] += 1
        return versions, slots

    def phrases(self, slots: Mapping[str, float]) -> list[Phrases]:
        """What the answers of slots that are in use say often, the heaviest slot's first; slots: name -> weight."""
        return [self._phrases[slot] for slot in sorted(slots, key=lambda s: -slots[s])]

    def give_back(self, slots: Collection[str]) -> None:
        """A row that had these slots has ended."""
        held = {slot for versions in self._slots.values() for slot in versions.values()}
        for slot in slots:
            self._uses[slot] -= 1
            if slot not in held:
                self._release(slot)

    def _release(self, slot: str) -> None:
        if self._uses[slot] == 0:
            self._bank.unload(slot)
            del self._uses[slot], self._phrases[slot]
