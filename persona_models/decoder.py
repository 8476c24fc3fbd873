"""The model of the batch: rows that tokens are appended to, and the logits that come back.

Two implementations: transformers' own forward pass over a RowCache, for every architecture and device, with the gate of gated_lora.py; and
fused.py for Llama-like models on a CPU. This file knows nothing of requests, streams or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from persona_models.errors import ConfigError
from persona_models.fused import FusedDecoder, fits
from persona_models.gated_lora import LoraBank
from persona_models.gpu import CudaGraphs, Recordings, lean
from persona_models.row_cache import BLOCK, SPARE, RowCache, TransformersCache, chunk_mask

ATTENTION = ("full_attention", "sliding_attention")


class Decoder(Protocol):
    """Rows 0 to n - 1 are in flight; call it from one thread. `cache` holds their keys and values."""

    cache: RowCache

    def open(self, row: int, gate: Mapping[str, float]) -> None:
        """Give a free row its adapters, slot name -> weight, and forget what it held before."""
        ...

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Append tokens to a row; returns the next-token logits of the last one, (V,)."""
        ...

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed the first n rows T tokens each; returns the logits of what follows every one of them, (n, T, V)."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        ...

    def close(self, row: int) -> None:
        """Free a row."""
        ...


def make_decoder(model: Any, bank: LoraBank, rows: int, limit: int) -> Decoder:
    """The fastest decoder that fits the model; `limit` is the longest row in tokens. Raises ConfigError for a model whose rows cannot share a batch."""
    kinds = set(getattr(model.config, "layer_types", None) or ATTENTION[:1])
    if strangers := kinds - set(ATTENTION):
        raise ConfigError(f"base: {model.config.model_type} has layers of the kind {', '.join(sorted(strangers))}, which cannot be batched here yet")
    if fits(model):
        return FusedDecoder(model, bank, rows, limit)
    if model.device.type != "cuda":
        return TransformersDecoder(model, bank, rows, limit)
    lean(model)
    # Frequencies that follow the longest row are chosen on the CPU; some families have other ones for each kind of layer.
    steady = not any(kind in str(getattr(model.config, "rope_parameters", None)) for kind in ("dynamic", "longrope"))
    return TransformersDecoder(model, bank, rows, limit, Recordings(CudaGraphs(model.device)) if steady else None)


class TransformersDecoder:
    """See Decoder. With `recordings`, steps are padded to a few shapes, each of which is recorded once."""

    def __init__(self, model: Any, bank: LoraBank, rows: int, limit: int, recordings: Recordings | None = None) -> None:
        self.model, self.bank, self.limit, self.recordings = model, bank, limit, recordings
        self.device = model.device
        self.cache = RowCache(model.config.num_hidden_layers, rows, limit, model.dtype, model.device)
        self.shown = TransformersCache(self.cache)
        self.gates: list[Mapping[str, float]] = [{} for _ in range(rows)]
        self._opened: tuple[list[Mapping[str, float]], int] | None = None  # whose gate `_gate` holds: (gates, R)
        self._gate: Tensor | None = None  # (rows, 1, R), where recordings find it
        self.window: int | None = getattr(model.config, "sliding_window", None)
        self.kinds = getattr(model.config, "layer_types", None)

    def open(self, row: int, gate: Mapping[str, float]) -> None:
        self.cache.clear(row)
        self.gates[row] = gate

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self.gates[target] = self.gates[source]

    def close(self, row: int) -> None:
        self.open(row, {})

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        start = self.cache.grow(row, len(ids))
        self.shown.chunk(row, start)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        mask = chunk_mask(start, len(ids), self.cache.dtype, self.device)
        return self._forward(torch.tensor([ids], device=self.device), positions, mask, self.bank.open([self.gates[row]]), last=1)[0, -1]

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        n, t = len(tokens), len(tokens[0])
        rows, wide = (n, t) if self.recordings is None else (min(self.cache.rows, _power(n)), min(SPARE, _power(t)))
        # Rows and tokens that only fill the shape write behind what their row holds, where nobody looks and the next tokens go.
        starts = self.cache.lengths[:rows]
        columns = max(starts) + wide
        self.cache.reserve(columns)
        filled = [*([*ids, *[0] * (wide - t)] for ids in tokens), *[[0] * wide] * (rows - n)]
        said = torch.tensor([[start, *ids] for start, ids in zip(starts, filled, strict=True)])
        gate = self._open(self.gates[:n], rows)
        for row in range(n):
            self.cache.lengths[row] += t
        if self.recordings is None:
            return self._step(said, columns, gate)
        block = max(BLOCK, _power(columns) // 4)
        columns = min(self.cache.columns, -(-columns // block) * block)
        state = (self.cache.growths, self.bank.layouts)
        step = partial(self._step, columns=columns, gate=gate)
        return self.recordings.run((rows, wide, columns, gate is None), state, step, said)[:n, :t]

    def _step(self, said: Tensor, columns: int, gate: Tensor | None) -> Tensor:
        """said (n, 1 + T): a row's column for its first token, and its tokens -> logits (n, T, V). Of the device alone, so that it can be recorded."""
        said = said.to(self.device)
        at, mask = self.cache.window(said[:, 0], said.shape[1] - 1, columns)
        self.shown.next_tokens(at, columns)
        # Tokens tried beyond the end of the context come to nothing, but a table of positions must not be asked for them.
        return self._forward(said[:, 1:], at.clamp(max=self.limit - 1), mask, gate)

    def _open(self, gates: list[Mapping[str, float]], rows: int) -> Tensor | None:
        """The gate of the first rows, (rows, 1, R), made anew only where rows or slots changed, and always in the same place while R is the same."""
        if not self.bank.layers or not any(gates):
            return None
        if self._gate is None or self._gate.shape[2] != self.bank.rank:
            like = next(iter(self.bank.layers.values())).A
            self._gate, self._opened = like.new_zeros(self.cache.rows, 1, self.bank.rank), None
        if self._opened != (gates, self.bank.rank):
            self._gate[: len(gates)] = self.bank.open(gates)
            self._opened = (gates, self.bank.rank)
        return self._gate[:rows]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, gate: Tensor | None, last: int = 0) -> Tensor:
        """(B, T) tokens at positions (B, T), looking where mask (B, 1, T, C) is 0 -> logits of the last ones, 0 for all, (B, last, V)."""
        self.bank.gate.rows = gate
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(mask, positions),
            past_key_values=self.shown,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: Tensor = out.logits
        return logits

    def _masks(self, mask: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        if self.window is None or (self.kinds is not None and "sliding_attention" not in self.kinds):
            return mask
        columns = torch.arange(mask.shape[-1], device=self.device)
        near = mask.masked_fill((columns <= positions[..., None] - self.window)[:, None], float("-inf"))
        return near if self.kinds is None else {"full_attention": mask, "sliding_attention": near}


def _power(n: int) -> int:
    """The smallest power of two that is not less."""
    return int(1 << (n - 1).bit_length())
