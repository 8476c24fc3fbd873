"""The training loop that `pretrain` and `finetune` share: seeded, resumable, with a progress bar.

A batch is a pure function of its step, so a run that was killed and resumed sees the same batches and reaches the same losses as one that was not.
A checkpoint is one safetensors file, written beside and renamed into place. This file knows nothing of corpora, personas or MLflow.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from persona_models.errors import WorkError

# (ids, labels), both of length T; -100 marks positions without a loss
Encoded = tuple[list[int], list[int]]


class Batches(Protocol):
    """Training data by step."""

    steps: int

    def batch(self, step: int) -> list[Encoded]:
        """The examples of a step; the same step always gives the same examples."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How to train. `lr` is the peak rate, reached after `warmup` (a share of the steps), then a cosine down to a tenth."""

    lr: float
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    save_every_steps: int = 100
    seed: int = 0
    patience: int = 0  # looks at the watched examples without a better loss before training stops; 0 never stops early
    watch_every_steps: int = 20


@dataclass
class History:
    """Losses by step (mean over the answer tokens of the batch, nats) and how much was seen."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    resumed_at: int | None = None
    watched: list[float] = field(default_factory=list)  # loss of the watched examples at each look

    @property
    def since_best(self) -> int:
        """Looks since the one with the lowest loss, the first of several."""
        return len(self.watched) - 1 - min(range(len(self.watched)), key=lambda i: self.watched[i]) if self.watched else 0


def rate_at(step: int, steps: int, settings: LoopSettings) -> float:
    """Learning rate of a step."""
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def pad(batch: Sequence[Encoded], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Encoded examples -> ids (B, T) and labels (B, T), padded on the right; padding carries no loss, and causal attention never looks right."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), width), pad_id)
    labels = torch.full((len(batch), width), -100)
    for i, (x, y) in enumerate(batch):
        ids[i, : len(x)] = torch.tensor(x)
        labels[i, : len(y)] = torch.tensor(y)
    return ids.to(device), labels.to(device)


def token_loss(model: Any, ids: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy over the labelled tokens, nats; reduction as in torch.

    The output head, a fifth of a small model's work, runs only over the columns where some row has a label.
    """
    wanted = labels[:, 1:] != -100
    columns = wanted.any(dim=0).nonzero()[:, 0]
    only = {"logits_to_keep": columns} if takes_columns(model) else {}
    logits = model(input_ids=ids, use_cache=False, **only).logits
    logits = logits if only else logits[:, columns]
    kept = wanted[:, columns]
    return nn.functional.cross_entropy(logits[kept].float(), labels[:, 1:][:, columns][kept], reduction=reduction)


def takes_columns(model: Any) -> bool:
    """Whether the model's forward takes the columns to compute logits for; code that came with a model may not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def trains_in_bf16(device: torch.device) -> bool:
    """Whether matrix products go faster in bfloat16; a CPU without instructions for it would emulate them slowly."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return device.type == "cuda"


@torch.inference_mode()
def losses_by_example(model: Any, examples: Sequence[Encoded], pad_id: int, *, rows: int = 16) -> tuple[list[float], list[int]]:
    """(summed loss in nats, labelled tokens) of every example, in order."""
    model.eval()
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        ids, labels = pad([examples[i] for i in part], pad_id, model.device)
        flat = token_loss(model, ids, labels, reduction="none")
        tokens = (labels[:, 1:] != -100).sum(1).tolist()
        # The losses of a batch lie row by row.
        for i, losses in zip(part, flat.split(tokens), strict=True):
            sums[i], counts[i] = float(losses.sum()), len(losses)
    return sums, counts


def mean_loss(model: Any, examples: Sequence[Encoded], pad_id: int, *, rows: int = 16) -> float:
    """Mean loss over all labelled tokens of the examples, nats a token."""
    sums, counts = losses_by_example(model, examples, pad_id, rows=rows)
    return sum(sums) / max(1, sum(counts))


def train(
    model: Any,
    batches: Batches,
    settings: LoopSettings,
    *,
    pad_id: int,
    checkpoint: Path,
    identity: dict[str, Any],
    title: str,
    on_step: Callable[[int, float], None] | None = None,
    watch: Sequence[Encoded] = (),
) -> History:
    """Train the parameters of `model` that require gradients, in place.

    watch: examples to look at every `settings.watch_every_steps`; the parameters end as they were at the best look, and training stops after
    `settings.patience` looks that were no better.

    checkpoint: a file; a run of the same `identity` (settings, data digest) that was cut off goes on from it, and one that was finished has nothing to
    do. A checkpoint of another identity is refused with WorkError, since mixing two runs would be neither.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decay = [p for n, p in params.items() if p.ndim >= 2]
    plain = [p for n, p in params.items() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    whole = {**identity, "loop": asdict(settings), "steps": batches.steps}
    history = History()
    best: dict[str, Tensor] = {}
    start = 0
    if checkpoint.exists():
        start = _restore(checkpoint, params, optimizer, history, whole, best)
        history.resumed_at = start
    watching = bool(watch) and settings.patience > 0
    model.train()
    half = trains_in_bf16(model.device)
    # A run that had stopped early was taken up again only to be saved.
    end = start if watching and history.since_best >= settings.patience else batches.steps
    with tqdm(total=batches.steps, initial=start, desc=title, unit="step", dynamic_ncols=True) as bar:
        for step in range(start, end):
            # Dropout, where a configuration asks for it, must not depend on whether the run was cut off before.
            torch.manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, batches.steps, settings)
            ids, labels = pad(batches.batch(step), pad_id, model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
                loss = token_loss(model, ids, labels)
            if not torch.isfinite(loss):
                raise WorkError(f"{title}: the loss is {float(loss)} at step {step}; lower the learning rate ({settings.lr})")
            loss.backward()
            nn.utils.clip_grad_norm_(params.values(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.losses.append(float(loss.detach()))
            history.tokens += int(ids.numel())
            if on_step:
                on_step(step, history.losses[-1])
            recent = history.losses[-20:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            bar.update()
            done = step + 1 == batches.steps
            if watching and (done or (step + 1) % settings.watch_every_steps == 0):
                history.watched.append(mean_loss(model, watch, pad_id))
                model.train()
                if history.since_best == 0:
                    best = {n: p.detach().clone() for n, p in params.items()}
                done = done or history.since_best >= settings.patience
            if done or (step + 1) % settings.save_every_steps == 0:
                spent = replace(history, seconds=history.seconds + bar.format_dict["elapsed"])
                _save(checkpoint, step + 1, params, optimizer, spent, whole, best)
            if done:
                break
        history.seconds += bar.format_dict["elapsed"]
    with torch.no_grad():
        for name, value in best.items():
            params[name].copy_(value)
    model.eval()
    return history


def _save(
    path: Path,
    step: int,
    params: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: History,
    identity: dict[str, Any],
    best: Mapping[str, Tensor],
) -> None:
    tensors = {f"param/{n}": p.detach().contiguous() for n, p in params.items()} | {f"best/{n}": p.contiguous() for n, p in best.items()}
    for name, p in params.items():
        # A parameter that no step has reached has no moments yet.
        if state := optimizer.state.get(p):
            tensors |= {f"m/{name}": state["exp_avg"], f"v/{name}": state["exp_avg_sq"]}
    tensors["watched"] = torch.tensor(history.watched, dtype=torch.float64)
    tensors["losses"] = torch.tensor(history.losses, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    about = {"step": str(step), "tokens": str(history.tokens), "seconds": str(history.seconds), "identity": _text(identity)}
    save_file(tensors, partial, metadata=about)
    partial.replace(path)


def _restore(
    path: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: History, identity: dict[str, Any], best: dict[str, Tensor]
) -> int:
    with safe_open(path, "pt", device="cpu") as f:
        meta = f.metadata()
        if meta["identity"] != _text(identity):
            raise WorkError(f"{path} belongs to a run with other settings or data; delete it to start anew")
        step = int(meta["step"])
        held = set(f.keys())
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(f.get_tensor(f"param/{name}"))
                if f"best/{name}" in held:
                    best[name] = f.get_tensor(f"best/{name}").to(p.device)
                if f"m/{name}" not in held:
                    continue
                # A fused AdamW keeps its step count beside the parameter.
                optimizer.state[p] = {
                    "step": torch.tensor(float(step), device=p.device),
                    "exp_avg": f.get_tensor(f"m/{name}").to(p.device),
                    "exp_avg_sq": f.get_tensor(f"v/{name}").to(p.device),
                }
        history.watched = f.get_tensor("watched").tolist()
        history.losses = f.get_tensor("losses").tolist()
        history.tokens = int(meta["tokens"])
    history.seconds = float(meta.get("seconds", 0.0))
    return step


def belongs(checkpoint: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run with this identity, whatever its loop's settings."""
    try:
        with safe_open(checkpoint, "pt", device="cpu") as f:
            found = json.loads(f.metadata()["identity"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False
    return all(found.get(k) == json.loads(json.dumps(v, default=str)) for k, v in identity.items())


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True, default=str)
