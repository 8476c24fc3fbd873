"""Fine-tuning beside the ecosystem's reference trainer: the same samples, steps, LoRA configuration and schedule, in one process, taking turns.

The reference is transformers' Trainer as somebody would write it who follows the documentation; it gets the batches in our order, so that what differs is
the training and not the luck of the draw. Knows nothing of MLflow.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from persona_models.base_model import BaseModel, load_base
from pipelines.compose import CORPUS, Corpus
from pipelines.dataset import corpus_samples
from pipelines.finetune import SampleBatches, encode_samples, peft_config
from pipelines.training import Encoded, LoopSettings, mean_loss, train, trains_in_bf16
from router.config import Training

# Each way goes first once.
ROUNDS = 2
HELD_OUT = 60
OURS, THEIRS = "deskroute", "transformers' Trainer"


def bench_finetune(config: Any, *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Seconds and held-out loss (nats per answer token) of each way; medians over the rounds, and the ratios to the reference."""
    settings: Training = config.training
    persona = config.catalogue()[-1]
    corpus = Corpus(config.corpus or CORPUS, tuple(p.id for p in config.catalogue()))
    base = load_base(config.base, dtype=config.dtype)

    def encoded(n: int, held_out: bool) -> list[Encoded]:
        samples = corpus_samples(corpus, persona.id, n, seed=settings.seed, held_out=held_out)
        return encode_samples(base, samples, persona.manner, settings.max_tokens)

    examples, unseen = encoded(settings.rows * settings.steps, False), encoded(HELD_OUT, True)
    ways: dict[str, Callable[[Any], None]] = {
        OURS: lambda model: _ours(model, base, examples, settings),
        THEIRS: lambda model: _theirs(model, base, examples, settings),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            torch.manual_seed(settings.seed)
            model = get_peft_model(base.model, peft_config(settings, base.model))
            try:
                began = time.perf_counter()
                ways[way](model)
                seconds[way].append(time.perf_counter() - began)
                losses[way].append(mean_loss(model, unseen, base.tokenizer.pad_token_id))
            finally:
                model.unload()
                base.model.requires_grad_(False)
    spent = {way: statistics.median(s) for way, s in seconds.items()}
    reached = {way: statistics.median(found) for way, found in losses.items()}
    return [
        {
            "trainer": way,
            "steps": settings.steps,
            "seconds": round(spent[way], 1),
            "of the reference": round(spent[way] / spent[THEIRS], 3),
            "held-out loss": round(reached[way], 5),
            "loss of the reference": round(reached[way] / reached[THEIRS], 4),
        }
        for way in ways
    ]


def _ours(model: Any, base: BaseModel, examples: list[Encoded], settings: Training) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            SampleBatches(examples, settings.rows, settings.steps, settings.seed),
            LoopSettings(lr=settings.lr, weight_decay=0.0, save_every_steps=20, seed=settings.seed),
            pad_id=base.tokenizer.pad_token_id,
            checkpoint=Path(folder) / "checkpoint.safetensors",
            identity={},
            title=OURS,
        )


def _theirs(model: Any, base: BaseModel, examples: list[Encoded], settings: Training) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    ours = LoopSettings(lr=settings.lr)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.rows,
            max_steps=settings.steps,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=max(1, round(ours.warmup * settings.steps)),
            weight_decay=0.0,
            adam_beta2=0.98,
            max_grad_norm=ours.clip_norm,
            seed=settings.seed,
            train_sampling_strategy="sequential",
            bf16=trains_in_bf16(model.device),
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type == "cuda",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
        )
        batches = SampleBatches(examples, settings.rows, settings.steps, settings.seed)
        ordered = [example for step in range(settings.steps) for example in batches.batch(step)]
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in ordered]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(base.tokenizer))  # type: ignore[arg-type]
        trainer.train()
        model.eval()
