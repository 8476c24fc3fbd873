"""A Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) written as few, large operations, for CPUs, where small models spend their time between them.

The projections of a layer that read the same input are one product; rotary positions are one complex multiplication; weights are packed. Every row of
the batch keeps its own copy of its adapters' factors, (r, in) and (r, out) a layer, so that a step costs the same however many personas there are.
The models of transformers are the reference in tests. This file knows nothing of requests, slots or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persona_models.gated_lora import LoraBank
from persona_models.packed import Product, packed
from persona_models.row_cache import RowCache, zeros

# Columns from which torch's own attention is the faster one.
LONG = 2048
# Rows times key heads from which scores are computed with the queries on the right.
MANY = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def fits(model: Any) -> bool:
    """Whether this file can stand in for the model: one of the families, on a CPU in float32, nothing unusual in its configuration."""
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        config.model_type in FAMILIES
        and getattr(config, "quantization_config", None) is None
        and model.device.type == "cpu"
        and model.dtype == torch.float32
        and config.hidden_act in ("silu", "swish")
        and rope in ("default", "linear", "llama3")
        and not any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and not (getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None))
    )


@dataclass
class _Site:
    """Projections that read one input: their rows in the bank, and the factors of every row of the batch."""

    modules: tuple[str, ...]
    widths: tuple[int, ...]
    n_in: int
    order: Tensor | None  # how the outputs of queries and keys are permuted, (out,) for each of the first two modules
    A: Tensor | None = None  # (rows, k r, in)
    B: tuple[Tensor, ...] = ()  # per run of equally wide modules (rows, k', r, out)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first module, how many) of equally wide neighbours."""
        found: list[tuple[int, int]] = []
        for j, width in enumerate(self.widths):
            if found and self.widths[found[-1][0]] == width:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((j, 1))
        return found


@dataclass
class _Layer:
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    before_attention: Tensor  # norm weights, times sqrt(d)
    before_mlp: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    sites: tuple[_Site, _Site, _Site, _Site]  # qkv, o, gate_up, down


class FusedDecoder:
    """See decoder.Decoder."""

    def __init__(self, model: Any, bank: LoraBank, rows: int, limit: int) -> None:
        config = model.config
        self.bank, self.rows = bank, rows
        self.d, self.mlp, self.heads, self.kv_heads = (
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.dim = getattr(config, "head_dim", None) or self.d // self.heads
        inner = model.model
        self.cache = RowCache(len(inner.layers), rows, limit, torch.float32, torch.device("cpu"))
        self.embedding = inner.embed_tokens.weight
        self.head = packed(model.lm_head.weight, model.lm_head.bias)
        root = math.sqrt(self.d)
        # |x| / sqrt(d) under the root of an RMS norm, with its epsilon: sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(d eps)) / sqrt(d).
        self.floor = torch.tensor(math.sqrt(self.d * config.rms_norm_eps))
        self.head_floor = torch.tensor(math.sqrt(self.dim * config.rms_norm_eps))
        self.last_norm = inner.norm.weight * root
        rotary = inner.rotary_emb
        angles = torch.outer(torch.arange(self.cache.limit, dtype=torch.float32), rotary.inv_freq.float())
        self.turns = torch.polar(torch.full_like(angles, float(rotary.attention_scaling)), angles)  # (positions, D / 2)
        self.layers = [self._layer(f"model.layers.{i}", layer) for i, layer in enumerate(inner.layers)]
        self.gates: list[Mapping[str, float]] = [{} for _ in range(rows)]
        self.rank = 0

    def open(self, row: int, gate: Mapping[str, float]) -> None:
        """Give a free row its adapters, slot name -> weight, and forget what it held before."""
        self.cache.clear(row)
        self.gates[row] = {name: weight for name, weight in gate.items() if self.bank.slots[name].rank}
        # As wide as the widest row: a mixture's rows are wider, and all rows would go on paying for it when it is gone.
        needed = max(sum(self.bank.slots[name].rank for name in g) for g in self.gates)
        if needed and needed != self.rank:
            self._lay_out(needed)
            return
        for layer in self.layers:
            for site in layer.sites:
                self._fill(site, row)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        self.cache.move(source, target)
        self.gates[target] = self.gates[source]
        for layer in self.layers:
            for site in layer.sites:
                if site.A is not None:
                    site.A[target] = site.A[source]
                    for b in site.B:
                        b[target] = b[source]

    def close(self, row: int) -> None:
        """Free a row; its factors stay until another one takes it, and no step looks at them."""
        self.cache.clear(row)
        self.gates[row] = {}

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Append tokens to a row; returns the next-token logits of the last one, (V,)."""
        tokens = len(ids)
        start = self.cache.grow(row, tokens)
        turns = self.turns[start : start + tokens, None]
        adapted = bool(self.gates[row])
        x = nn.functional.embedding(torch.tensor(ids), self.embedding)
        later = torch.ones(tokens, start + tokens, dtype=torch.bool).tril_(start) if start else None
        for number, layer in enumerate(self.layers):
            qkv_site, o_site, gate_up_site, down_site = layer.sites
            h = self._norm(x, layer.before_attention)
            qkv = layer.qkv(h)
            if adapted:
                _adapt_row(qkv_site, row, h, qkv)
            q, k, v = self._split(layer, qkv, turns)
            self.cache.put_chunk(number, row, start, k.transpose(0, 1), v.transpose(0, 1))
            keys, values = self.cache.layer(number)
            if number == len(self.layers) - 1:
                # Nobody looks at what the last layer makes of the other tokens.
                x, q, later = x[-1:], q[-1:], None
            seen = slice(0, start + tokens)
            attended = nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                keys[row : row + 1, :, seen],
                values[row : row + 1, :, seen],
                attn_mask=later,
                is_causal=later is None and len(q) > 1,
                enable_gqa=self.kv_heads != self.heads,
            )
            a = attended[0].transpose(0, 1).reshape(len(x), -1)
            out = layer.o(a)
            if adapted:
                _adapt_row(o_site, row, a, out)
            x = x + out
            h = self._norm(x, layer.before_mlp)
            both = layer.gate_up(h)
            if adapted:
                _adapt_row(gate_up_site, row, h, both)
            s = nn.functional.silu(both[:, : self.mlp]).mul_(both[:, self.mlp :])
            out = layer.down(s)
            if adapted:
                _adapt_row(down_site, row, s, out)
            x = x + out
        logits: Tensor = self.head(self._norm(x[-1:], self.last_norm))[0]
        return logits

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed the first n rows T tokens each; returns the logits of what follows every one of them, (n, T, V)."""
        n, t = len(tokens), len(tokens[0])
        at, mask = self.cache.next_columns(n, t)
        seen = slice(0, mask.shape[-1])
        turns = self.turns[at.view(-1)][:, None]
        adapted = any(self.gates[:n])
        # Query heads that share a key head are more queries of it: every key is read once.
        groups = self.heads // self.kv_heads
        mask = mask.expand(n, self.kv_heads, t, -1).repeat(1, 1, groups, 1)
        x = nn.functional.embedding(torch.tensor(tokens).view(-1), self.embedding)
        for number, layer in enumerate(self.layers):
            qkv_site, o_site, gate_up_site, down_site = layer.sites
            h = self._norm(x, layer.before_attention)
            qkv = layer.qkv(h)
            if adapted:
                _adapt_rows(qkv_site, n, h, qkv)
            q, k, v = self._split(layer, qkv, turns)
            self.cache.put(number, at, k.view(n, t, self.kv_heads, self.dim), v.view(n, t, self.kv_heads, self.dim))
            keys, values = self.cache.layer(number)
            asked = q.view(n, t, self.kv_heads, groups, self.dim).permute(0, 2, 3, 1, 4).reshape(n, self.kv_heads, groups * t, self.dim)
            attended = _attend(asked, keys[:n, :, seen], values[:n, :, seen], mask)
            a = attended.view(n, self.heads, t, self.dim).transpose(1, 2).reshape(n * t, -1)
            out = layer.o(a)
            if adapted:
                _adapt_rows(o_site, n, a, out)
            x = out.add_(x)
            h = self._norm(x, layer.before_mlp)
            both = layer.gate_up(h)
            if adapted:
                _adapt_rows(gate_up_site, n, h, both)
            s = nn.functional.silu(both[:, : self.mlp]).mul_(both[:, self.mlp :])
            out = layer.down(s)
            if adapted:
                _adapt_rows(down_site, n, s, out)
            x = out.add_(x)
        return self.head(self._norm(x, self.last_norm)).view(n, t, -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.div(x, torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)).mul_(weight)

    def _split(self, layer: _Layer, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, outputs) -> turned queries (n, H, D), turned keys and values (n, H', D)."""
        n, both = len(qkv), self.heads + self.kv_heads
        pairs = qkv[:, : both * self.dim].reshape(n, both, self.dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            pairs = torch.div(pairs, torch.hypot(torch.linalg.vector_norm(pairs, dim=-1, keepdim=True), self.head_floor))
            pairs[:, : self.heads].mul_(layer.query_norm)
            pairs[:, self.heads :].mul_(layer.key_norm)
        turned = torch.view_as_real(torch.view_as_complex(pairs.view(n, both, self.dim // 2, 2)) * turns).view(n, both, self.dim)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, both * self.dim :].view(n, self.kv_heads, self.dim)

    # -- set-up --------------------------------------------------------------------------------------------------------------------------

    def _layer(self, name: str, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v, o = (_plain(getattr(attention, f"{x}_proj")) for x in "qkvo")
        gate, up, down = (_plain(getattr(mlp, f"{x}_proj")) for x in ("gate", "up", "down"))
        # transformers keeps the two halves of a rotary pair half a head apart; as neighbours they are one complex number.
        half = self.dim // 2
        order = torch.stack([torch.arange(half), torch.arange(half) + half], 1).reshape(-1)
        by_head = [order + h * self.dim for h in range(max(self.heads, self.kv_heads))]
        turn_q, turn_k = torch.cat(by_head[: self.heads]), torch.cat(by_head[: self.kv_heads])
        biased = q.bias is not None
        bias = torch.cat([q.bias[turn_q], k.bias[turn_k], v.bias]) if biased else None
        root, head_root = math.sqrt(self.d), math.sqrt(self.dim)
        norms = [getattr(attention, f"{x}_norm", None) for x in "qk"]
        return _Layer(
            qkv=packed(torch.cat([q.weight[turn_q], k.weight[turn_k], v.weight]), bias),
            o=packed(o.weight, o.bias),
            gate_up=packed(torch.cat([gate.weight, up.weight]), None if gate.bias is None else torch.cat([gate.bias, up.bias])),
            down=packed(down.weight, down.bias),
            before_attention=layer.input_layernorm.weight * root,
            before_mlp=layer.post_attention_layernorm.weight * root,
            query_norm=None if norms[0] is None else norms[0].weight[order] * head_root,
            key_norm=None if norms[1] is None else norms[1].weight[order] * head_root,
            sites=(
                _site(f"{name}.self_attn", {"q_proj": q, "k_proj": k, "v_proj": v}, torch.cat([turn_q, turn_k])),
                _site(f"{name}.self_attn", {"o_proj": o}),
                _site(f"{name}.mlp", {"gate_proj": gate, "up_proj": up}),
                _site(f"{name}.mlp", {"down_proj": down}),
            ),
        )

    def _lay_out(self, rank: int) -> None:
        """Factors of `rank` for every row, anew; sites that no adapter adapts get none."""
        self.rank = rank
        for layer in self.layers:
            for site in layer.sites:
                if any(m in self.bank.layers for m in site.modules):
                    self._make_factors(site)
                    for row, gate in enumerate(self.gates):
                        if gate:
                            self._fill(site, row)

    def _make_factors(self, site: _Site) -> None:
        cpu = torch.device("cpu")
        site.A = zeros((self.rows, len(site.modules) * self.rank, site.n_in), torch.float32, cpu)
        site.B = tuple(zeros((self.rows, k, self.rank, site.widths[first]), torch.float32, cpu) for first, k in site.runs)

    def _fill(self, site: _Site, row: int) -> None:
        """Write a row's factors, weighted by its gate; of several adapters one below the other, the rest zeros."""
        if site.A is None:
            if not self.gates[row] or not any(m in self.bank.layers for m in site.modules):
                return
            self._make_factors(site)
        assert site.A is not None
        site.A[row].zero_()
        for b in site.B:
            b[row].zero_()
        for (first, k), b in zip(site.runs, site.B, strict=True):
            for j in range(first, first + k):
                bank = self.bank.layers.get(site.modules[j])
                if bank is None:
                    continue
                below = 0
                for name, weight in self.gates[row].items():
                    slot = self.bank.slots[name]
                    rows = slice(slot.start, slot.start + slot.rank)
                    into = j * self.rank + below
                    site.A[row, into : into + slot.rank] = bank.A[rows]
                    factor = bank.B[rows] * weight
                    if site.order is not None and j < 2:
                        start = 0 if j == 0 else site.widths[0]
                        factor = factor[:, site.order[start : start + site.widths[j]]]
                    b[row, j - first, below : below + slot.rank] = factor
                    below += slot.rank


def _plain(layer: Any) -> Any:
    """The layer itself, or the one inside a gated layer."""
    return getattr(layer, "base", layer)


def _site(prefix: str, layers: Mapping[str, Any], order: Tensor | None = None) -> _Site:
    first = next(iter(layers.values()))
    return _Site(tuple(f"{prefix}.{name}" for name in layers), tuple(x.out_features for x in layers.values()), first.in_features, order)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Queries (n, H, T, D) over keys and values (n, H, C, D), mask (n, H, T, C) added to the scores -> (n, H, T, D).

    torch's own attention is the faster one for one query a head and for long rows; else this one by a tenth, with many rows by a quarter.
    """
    n, heads, t, dim = q.shape
    if t == 1 or keys.shape[2] > LONG:
        return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    q, mask = q.reshape(n * heads, t, dim), mask.reshape(n * heads, t, -1)
    # Rows and heads of a cache lie at even distances, so nothing is copied.
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if n * heads >= MANY and t >= 4:
        # The same scores with the few queries on the right: MKL's product is then up to twice as fast.
        scores = torch.add(mask, torch.bmm(keys, (q * dim**-0.5).transpose(1, 2)).transpose(1, 2))
    else:
        scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=dim**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(n, heads, t, dim)


def _adapt_rows(site: _Site, n: int, x: Tensor, y: Tensor) -> None:
    """Add to y (n T, out) what the adapters of the first n rows make of their T tokens each, x (n T, in)."""
    if site.A is None:
        return
    t = len(x) // n
    a = torch.bmm(x.view(n, t, -1), site.A[:n].transpose(1, 2))  # (n, T, k r)
    if len(site.B) == 1 and (t == 1 or site.B[0].shape[1] == 1):
        b = site.B[0]
        k, rank, width = b.shape[1:]
        y.view(n * k, t, width).baddbmm_(a.view(n * k, t, rank), b[:n].view(n * k, rank, width))
        return
    begin, column = 0, 0
    for b in site.B:
        k, rank, width = b.shape[1:]
        mine = a[:, :, begin : begin + k * rank].reshape(n, t, k, rank).transpose(1, 2)  # (n, k, T, r)
        added = torch.matmul(mine, b[:n])  # (n, k, T, width)
        y[:, column : column + k * width].add_(added.transpose(1, 2).reshape(n * t, k * width))
        begin, column = begin + k * rank, column + k * width


def _adapt_row(site: _Site, row: int, x: Tensor, y: Tensor) -> None:
    """Add to y (T, out) what the adapters of one row make of its tokens x (T, in)."""
    if site.A is None:
        return
    a = nn.functional.linear(x, site.A[row])  # (T, k r)
    begin, column = 0, 0
    for b in site.B:
        k, rank, width = b.shape[1:]
        for j in range(k):
            y[:, column : column + width].addmm_(a[:, begin : begin + rank], b[row, j])
            begin, column = begin + rank, column + width
