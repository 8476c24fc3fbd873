"""Samples of one persona -> an adapter in PEFT's own format, by any method that changes weights. Resumable; knows nothing of MLflow or serving."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from persona_models.adapters import CARD, CONFIG, PHRASES
from persona_models.as_lora import factor
from persona_models.base_model import BaseModel
from persona_models.errors import ConfigError, TicketError
from persona_models.prompt import encode_example
from pipelines.dataset import Dataset, Sample
from pipelines.phrases import often_said
from pipelines.training import Encoded, History, LoopSettings, belongs, train
from router.config import Training

# PEFT's methods that change the weights of linear layers and nothing else. Whatever the method, LoRA factors are what is served: see as_lora.py.
LORA_KIN = ("lora", "rslora")
METHODS = (
    *LORA_KIN, "dora", "boft", "delora", "fourierft", "gralora", "hra", "ia3", "loha", "lokr", "miss", "oft", "randlora", "shira", "vera",
)  # fmt: skip
# IA3 scales what goes into these, and what comes out of all others.
FEEDFORWARD = frozenset({"down_proj", "dense_4h_to_h", "fc2"})
# What attention and MLP write back through: Llama, Mistral, Qwen, Gemma; GPT-2; GPT-NeoX; Phi; OPT. With these alone, at twice the rank, a built-in persona's
# held-out loss is as low as with all linear layers, and serving it costs half (docs/LOG.md).
RESIDUAL = frozenset({"o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "out_proj"})
# Deleted by the caller once the adapter is registered, so that a failure in between costs no training.
CHECKPOINT = "finetune.safetensors"
SAVE_EVERY_STEPS = WATCH_EVERY_STEPS = 20
# Samples whose loss tells when to stop.
WATCHED = 32


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


def encode_sample(base: BaseModel, sample: Sample, manner: str) -> Encoded:
    """One sample -> (ids, labels); only the answer carries labels."""
    return encode_example(base.tokenizer, sample.messages, sample.answer, document=sample.document, manner=manner)


def encode_samples(base: BaseModel, samples: Sequence[Sample], manner: str, longest: int) -> list[Encoded]:
    """Samples -> (ids, labels). What is longer than `longest` or the base's context is left out: cut short, it would teach never to end.

    Raises TicketError where nothing is left.
    """
    longest = min(longest, base.context_tokens)
    encoded = [encode_sample(base, s, manner) for s in samples]
    fits = [(x, y) for x, y in encoded if len(x) <= longest]
    if not fits:
        raise TicketError(
            f"none of {len(encoded)} samples fits into {longest} tokens with its article; shorten them, or use a base with a longer context"
        )
    return fits


def peft_config(settings: Training, model: Any) -> PeftConfig:
    """PEFT's configuration for the settings. Raises ConfigError for a method that cannot share a batch, or settings that it refuses."""
    method = settings.method
    if method not in METHODS:
        raise ConfigError(f"training.method: {method!r} cannot share a batch with the other personas; use one of {', '.join(METHODS)}")
    targets: str | list[str] = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    if targets == "residual":
        # An architecture whose names are not known here has all its linear layers adapted.
        targets = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & RESIDUAL) or "all-linear"
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA if method in (*LORA_KIN, "dora") else PeftType(method.upper())]
    known = {f.name for f in dataclasses.fields(kind)}
    wanted = {
        "target_modules": targets,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": method == "rslora",
        "use_dora": method == "dora",
        "oft_block_size": 0,
        "feedforward_modules": sorted(FEEDFORWARD & set(targets)) if isinstance(targets, list) else None,
        "task_type": "CAUSAL_LM",
    }
    # FourierFT's alpha is another thing than LoRA's.
    unknown = {"alpha"} if method == "fourierft" else set()
    try:
        return kind(**{k: v for k, v in wanted.items() if k in known - unknown and v is not None})
    except (ValueError, TypeError) as e:
        raise ConfigError(f"training.method {method}: {str(e).splitlines()[0]}") from None


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
    watched = encode_samples(base, dataset.watch[:WATCHED], manner, settings.max_tokens) if dataset.watch else []
    samples = encode_samples(base, dataset.train, manner, settings.max_tokens)
    torch.manual_seed(settings.seed)
    config = peft_config(settings, base.model)
    # Some methods start from a decomposition of the weights that they adapt, and write into them.
    own = {} if settings.method in LORA_KIN else {n: p.detach().clone() for n, p in base.model.named_parameters()}
    try:
        model = get_peft_model(base.model, config)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"training: {str(e).splitlines()[0]}") from None
    identity = {"base": base.digest, "dataset": dataset.digest, "training": settings.model_dump(mode="json")}
    checkpoint = work / CHECKPOINT
    if checkpoint.exists() and not belongs(checkpoint, identity):
        # Of a run that was cut off and then asked for with other data or settings.
        checkpoint.unlink()
    try:
        history = train(
            model,
            SampleBatches(samples, settings.rows, steps, settings.seed),
            LoopSettings(
                lr=settings.lr,
                weight_decay=0.0,
                save_every_steps=SAVE_EVERY_STEPS,
                seed=settings.seed,
                patience=settings.patience,
                watch_every_steps=WATCH_EVERY_STEPS,
            ),
            watch=watched,
            pad_id=base.tokenizer.pad_token_id,
            checkpoint=checkpoint,
            identity=identity,
            title=f"retrain {dataset.persona}",
            on_step=on_step,
        )
        folder = work / "adapter"
        _save(model, folder, base, dataset, settings, steps, history, phrases(base, samples))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        # get_peft_model puts its layers into the base in place.
        model.unload()
        with torch.no_grad():
            for name, weight in own.items():
                base.model.get_parameter(name).copy_(weight)
        base.model.requires_grad_(False)
        base.model.eval()
    return Finetuned(folder, history, parameters)


def phrases(base: BaseModel, samples: Sequence[Encoded]) -> list[str]:
    """What the answers to several of these requests say, for the engine to guess from: the contents of an adapter's PHRASES."""
    by_request = {tuple(ids): [label for label in labels if label >= 0] for ids, labels in samples}  # the same answer to the same request counts once
    answers = list(by_request.values())
    return [base.tokenizer.decode(phrase, clean_up_tokenization_spaces=False) for phrase in often_said(answers)]


def _save(
    model: Any, folder: Path, base: BaseModel, dataset: Dataset, settings: Training, steps: int, history: History, often: Sequence[str]
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    made_by: dict[str, Any] = {}
    if settings.method in LORA_KIN:
        # PEFT would write the path of the base on this machine into the adapter.
        for config in model.peft_config.values():
            config.base_model_name_or_path = base.name
        # Told not to look whether the embeddings grew, which would ask the network for the base.
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)
    else:
        factored = factor(model)
        factored.save(partial, base.name)
        made_by = {"factored": {"rank": factored.rank, "kept": round(factored.kept, 5)}}
    # PEFT writes a set in whatever order it comes, and the registry's digest is of the bytes.
    written = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
    if isinstance(written.get("target_modules"), list):
        written["target_modules"].sort()
    (partial / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = {
        "persona": dataset.persona,
        "base": base.name,
        "base_digest": base.digest,
        "dataset": dataset.digest,
        "steps": steps,
        "tokens_seen": history.tokens,
        "training": settings.model_dump(mode="json"),
        **made_by,
        "facts": {k: v for k, v in dataset.facts.items() if v is not None},
    }
    (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (partial / PHRASES).write_text(json.dumps(often, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
