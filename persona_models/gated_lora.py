"""The gated linear layer: every loaded LoRA adapter lies side by side, and each row of the batch says how much of each it wants.

For every adapted layer, over slots s = 1..S of ranks r_s with R = sum r_s:

    A: (R, in)    B: (R, out)    gate: (B, 1, R)    y = W x + ((x A^T) * gate) B

A one-hot gate is exactly that adapter, a gate of several weights a mixture of personas, a gate of zeros the base. No gather, no splitting of the batch.
This file knows nothing of personas, files or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from persona_models.errors import AdapterError

# module name -> (A: (r, in), B: (r, out)); alpha / r is folded into B
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass
class Gate:
    """The gate of the batch in flight, shared by all gated layers; None while only the base is asked for."""

    rows: Tensor | None = None  # (B, 1, R)


class GatedLinear(nn.Module):
    """A frozen linear layer (or GPT-2's Conv1D) with the adapters' factors beside it."""

    def __init__(self, base: nn.Linear | Conv1D, gate: Gate, rank: int) -> None:
        super().__init__()
        self.base = base
        self.gate = gate
        self.in_features, self.out_features = linear_shape(base)
        weight = base.weight
        self.A = weight.new_zeros(rank, self.in_features)  # (R, in)
        self.B = weight.new_zeros(rank, self.out_features)  # (R, out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, in) -> (B, T, out)"""
        y = self.base(x)
        if self.gate.rows is None:
            return y
        opened = nn.functional.linear(x, self.A) * self.gate.rows
        return torch.addmm(y.flatten(0, 1), opened.flatten(0, 1), self.B).view_as(y)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, gated or not; Conv1D keeps its weight the other way round."""
    if isinstance(layer, nn.Linear | GatedLinear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    raise AdapterError(f"a {type(layer).__name__} cannot carry a LoRA adapter here; only linear layers can")


@dataclass(frozen=True)
class Slot:
    """Where one adapter's rows lie in R."""

    start: int
    rank: int


class LoraBank:
    """The adapters of one model. Not thread-safe: call it between steps, from the thread that runs the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gate = Gate()
        self.layers: dict[str, GatedLinear] = {}
        self.slots: dict[str, Slot] = {}
        self.rank = 0
        self.layouts = 0  # how often the factors went to another place, or other layers became gated

    @torch.no_grad()
    def load(self, name: str, rank: int, factors: Factors) -> None:
        """Put an adapter into a free slot of its rank, or grow R by it. Factors must already be checked against the model."""
        if name in self.slots:
            raise AdapterError(f"slot {name} is taken")
        slot = self._free_slot(rank)
        for module in factors:
            if module not in self.layers:
                self._install(module)
        end = slot.start + rank
        for module, layer in self.layers.items():
            # A target that this adapter does not adapt keeps zeros.
            a, b = factors.get(module, (None, None))
            layer.A[slot.start : end].zero_()
            layer.B[slot.start : end].zero_()
            if a is not None and b is not None:
                layer.A[slot.start : slot.start + a.shape[0]].copy_(a)
                layer.B[slot.start : slot.start + b.shape[0]].copy_(b)
        self.slots[name] = slot

    def unload(self, name: str) -> None:
        """Free a slot; its rows stay until another adapter of the rank takes them."""
        self.slots.pop(name)

    def uninstall(self) -> None:
        """Put the model's own layers back."""
        for module, layer in self.layers.items():
            parent, _, leaf = module.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base)
        self.layouts += 1
        self.layers.clear()
        self.slots.clear()
        self.rank = 0

    def open(self, gates: list[Mapping[str, float]]) -> Tensor | None:
        """The gate of a batch: one mapping slot name -> weight per row; (B, 1, R), or None when no row wants an adapter."""
        if not self.layers or not any(gates):
            return None
        weight = next(iter(self.layers.values())).A
        rows = torch.zeros(len(gates), 1, self.rank)
        for i, gate in enumerate(gates):
            for name, share in gate.items():
                slot = self.slots[name]
                rows[i, 0, slot.start : slot.start + slot.rank] = share
        return rows.to(weight)

    def _free_slot(self, rank: int) -> Slot:
        taken = sorted((s.start, s.start + s.rank) for s in self.slots.values())
        start = 0
        for begin, end in [*taken, (self.rank, self.rank)]:
            if begin - start >= rank:
                return Slot(start, rank)
            start = max(start, end)
        grow = start + rank - self.rank
        # All of them before any is taken, as memory may end in between.
        grown = [[torch.cat([f, f.new_zeros(grow, f.shape[1])]) for f in (layer.A, layer.B)] for layer in self.layers.values()]
        for layer, (a, b) in zip(self.layers.values(), grown, strict=True):
            layer.A, layer.B = a, b
        self.rank += grow
        self.layouts += 1
        return Slot(start, rank)

    def _install(self, module: str) -> None:
        parent, _, leaf = module.rpartition(".")
        owner = self.model.get_submodule(parent)
        layer = GatedLinear(getattr(owner, leaf), self.gate, self.rank)
        setattr(owner, leaf, layer)
        self.layers[module] = layer
        self.layouts += 1


class Merge:
    """One adapter inside the model's own weights: no gate and no cost, for a model that serves one persona."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own: dict[str, Tensor] = {}  # module name -> its weight as it was

    @torch.no_grad()
    def apply(self, factors: Factors) -> None:
        """Put an adapter in place of the one before, computed from the weights as they were, so that nothing adds up over many swaps."""
        self.undo()
        for module, (a, b) in factors.items():
            layer = self.model.get_submodule(module)
            self._own[module] = layer.weight.detach().clone()
            a, b = a.to(layer.weight.device), b.to(layer.weight.device)
            delta = (a.T @ b if isinstance(layer, Conv1D) else b.T @ a).to(layer.weight)
            layer.weight.add_(delta)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the model's own weights back."""
        for module, weight in self._own.items():
            self.model.get_submodule(module).weight.copy_(weight)
        self._own.clear()
