"""Samples of one persona -> a LoRA adapter in PEFT's own format. Resumable; knows nothing of MLflow or serving."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from persona_models.adapters import CARD
from persona_models.base_model import BaseModel
from persona_models.errors import ConfigError, TicketError
from persona_models.prompt import encode_example
from pipelines.dataset import Dataset, Sample
from pipelines.training import Encoded, History, LoopSettings, train
from router.config import Training

METHODS = ("lora", "rslora")
# What attention and MLP write back through: Llama, Mistral, Qwen, Gemma; GPT-2; GPT-NeoX; Phi; OPT. With these alone, at twice the rank, a built-in persona's
# held-out loss is as low as with all linear layers, and serving it costs half (docs/LOG.md).
RESIDUAL = frozenset({"o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "out_proj"})
# Deleted by the caller once the adapter is registered, so that a failure in between costs no training.
CHECKPOINT = "finetune.safetensors"


@dataclass(frozen=True)
class Finetuned:
    """A finished adapter folder and how it was made."""

    folder: Path
    history: History
    parameters: int


class SampleBatches:
    """Batches over encoded samples, shuffled anew each epoch; a pure function of seed and step."""

    def __init__(self, encoded: Sequence[Encoded], rows: int, steps: int, seed: int) -> None:
        self.encoded, self.rows, self.steps, self.seed = encoded, rows, steps, seed
        self.per_epoch = math.ceil(len(encoded) / rows)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def batch(self, step: int) -> list[Encoded]:
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return [self.encoded[i] for i in self._epoch[1][place]]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/epoch/{epoch}")
        order = list(range(len(self.encoded)))
        rng.shuffle(order)
        # Neighbours in length share a batch, so that little is padded; windows keep it random.
        window = self.rows * 8
        for i in range(0, len(order), window):
            order[i : i + window] = sorted(order[i : i + window], key=lambda j: len(self.encoded[j][0]))
        batches = [order[i : i + self.rows] for i in range(0, len(order), self.rows)]
        rng.shuffle(batches)
        return batches


def encode_samples(base: BaseModel, samples: Sequence[Sample], manner: str, longest: int) -> list[Encoded]:
    """Samples -> (ids, labels). What is longer than `longest` or the base's context is left out: cut short, it would teach never to end.

    Raises TicketError where nothing is left.
    """
    longest = min(longest, base.context_tokens)
    encoded = [encode_example(base.tokenizer, s.messages, s.answer, document=s.document, manner=manner) for s in samples]
    fits = [(x, y) for x, y in encoded if len(x) <= longest]
    if not fits:
        raise TicketError(
            f"none of {len(encoded)} samples fits into {longest} tokens with its article; shorten them, or use a base with a longer context"
        )
    return fits


def lora_config(settings: Training, model: Any) -> LoraConfig:
    """PEFT's configuration for the settings. Raises ConfigError for a method that cannot share a batch."""
    if settings.method not in METHODS:
        raise ConfigError(f"training.method: {settings.method!r} cannot share a batch with the other personas; use one of {', '.join(METHODS)}")
    targets: str | list[str] = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    if targets == "residual":
        # An architecture whose names are not known here has all its linear layers adapted.
        targets = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & RESIDUAL) or "all-linear"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        use_rslora=settings.method == "rslora",
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )


def finetune(
    base: BaseModel,
    dataset: Dataset,
    settings: Training,
    *,
    manner: str,
    steps: int,
    work: Path,
    on_step: Callable[[int, float], None] | None = None,
) -> Finetuned:
    """Train an adapter for the dataset's persona on a fresh copy of nothing: the base's own weights stay frozen and are left unchanged.

    `work` holds the checkpoint of a run that was cut off, and the finished adapter in `work/adapter`.
    """
    torch.manual_seed(settings.seed)
    config = lora_config(settings, base.model)
    try:
        model = get_peft_model(base.model, config)
    except ValueError as e:
        raise ConfigError(f"training.target_modules: {str(e).splitlines()[0]}") from None
    checkpoint = work / CHECKPOINT
    try:
        history = train(
            model,
            SampleBatches(encode_samples(base, dataset.train, manner, settings.max_tokens), settings.rows, steps, settings.seed),
            LoopSettings(lr=settings.lr, weight_decay=0.0, save_every_steps=50, seed=settings.seed),
            pad_id=base.tokenizer.pad_token_id,
            checkpoint=checkpoint,
            identity={"base": base.digest, "dataset": dataset.digest, "training": settings.model_dump(mode="json")},
            title=f"retrain {dataset.persona}",
            on_step=on_step,
        )
        folder = work / "adapter"
        _save(model, folder, base, dataset, settings, steps, history)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        # get_peft_model puts its layers into the base in place.
        model.unload()
        base.model.requires_grad_(False)
        base.model.eval()
    return Finetuned(folder, history, parameters)


def _save(model: Any, folder: Path, base: BaseModel, dataset: Dataset, settings: Training, steps: int, history: History) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # PEFT would write the path of the base on this machine into the adapter.
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.name
    model.save_pretrained(partial)
    (partial / "README.md").unlink(missing_ok=True)
    card = {
        "persona": dataset.persona,
        "base": base.name,
        "base_digest": base.digest,
        "dataset": dataset.digest,
        "steps": steps,
        "tokens_seen": history.tokens,
        "training": settings.model_dump(mode="json"),
        "facts": {k: v for k, v in dataset.facts.items() if v is not None},
    }
    (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
