"""The corpus -> a tokenizer and a small decoder, from scratch: the base that ships.

`pretrain` runs with torch and transformers alone (no Ray, no MLflow), so that it can be taken to a machine with a GPU; `pretrain_tracked` is the
command around it, which also writes the run.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from persona_models.errors import InputError
from persona_models.prompt import ASSISTANT, BUILTIN_TEMPLATE, END, KNOWLEDGE, PAD, SPECIAL_TOKENS, USER, encode_example
from pipelines.compose import CORPUS, Composer, Corpus
from pipelines.training import Encoded, History, LoopSettings, mean_loss, train

if TYPE_CHECKING:
    from router.config import Config


@dataclass(frozen=True)
class PretrainSettings:
    """Size of the built-in base and how long it is trained; the defaults are what ships."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    mlp: int = 640
    context_tokens: int = 1024
    steps: int = 4000
    rows: int = 8
    lr: float = 2e-3
    seed: int = 7


# Peak rate where a base is trained on from one that has learnt already.
LR_ON = 1e-3
HELD_OUT_SEED = 8


@dataclass(frozen=True)
class PretrainReport:
    """What came out, for the model card and the run."""

    parameters: int
    history: History
    held_out_loss: float
    corpus_digest: str
    hardware: str


class ComposedBatches:
    """Batches of composed examples; a pure function of seed and step.

    Examples come in chunks of CHUNK batches, sorted by length within the chunk so that little is padded.
    """

    CHUNK = 16

    def __init__(self, composer: Composer, tokenizer: Any, steps: int, rows: int, *, persona: str | None = None, longest: int = 1024) -> None:
        self.composer, self.tokenizer, self.steps, self.rows, self.persona, self.longest = composer, tokenizer, steps, rows, persona, longest
        self._chunk: tuple[int, list[list[Encoded]]] | None = None

    def batch(self, step: int) -> list[Encoded]:
        number, place = divmod(step, self.CHUNK)
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = (number, self._compose(number))
        return self._chunk[1][place]

    def _compose(self, number: int) -> list[list[Encoded]]:
        n = self.CHUNK * self.rows
        examples = [self.composer.example(number * n + i, self.persona) for i in range(n)]
        encoded = sorted((encode(self.tokenizer, e, self.longest) for e in examples), key=lambda e: len(e[0]))
        batches = [encoded[i : i + self.rows] for i in range(0, n, self.rows)]
        random.Random(f"{self.composer.seed}/chunk/{number}").shuffle(batches)
        return batches


def encode(tokenizer: Any, example: Any, longest: int) -> Encoded:
    """An Example -> (ids, labels), cut at `longest` tokens."""
    ids, labels = encode_example(tokenizer, example.messages, example.answer, document=example.document)
    return ids[:longest], labels[:longest]


def build_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own, so that a number is copied digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, additional_special_tokens=[KNOWLEDGE, USER, ASSISTANT], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = BUILTIN_TEMPLATE
    return tokenizer


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 of the given size with fresh weights, tied embeddings and a head start in copying (see copy_start)."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    copy_start(model)
    return model


@torch.no_grad()
def copy_start(model: Qwen2ForCausalLM) -> None:
    """Set the first two layers so that the fresh model already continues a text by what followed the same two tokens before (an induction head).

    A grounded answer copies its article, and from random weights a model of this size needs far more tokens to find that circuit than two CPU cores
    can feed it in an hour (docs/LOG.md). Layer 0 notes for every position which tokens stood one and two places before it; layer 1 looks for the place
    whose notes equal the present two tokens, and proposes the token found there. Everything stays trainable.

    The residual's coordinates: the first d - 2c hold the token's embedding, the next c a code of the token before, the last c of the one before that.
    """
    config = model.config
    d, n = config.hidden_size, config.hidden_size // config.num_attention_heads
    c = n // 2
    own, one, two = slice(0, d - 2 * c), slice(d - 2 * c, d - c), slice(d - c, d)
    std = 0.05
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0.0, std)
    embedding[:, d - 2 * c :] = 0.0
    basis = torch.linalg.qr(torch.randn(d - 2 * c, d - 2 * c)).Q
    code = basis[:c]  # (c, d - 2c), orthonormal rows
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(c) / c)  # angle per place of each rotary pair (i, i + c)
    for head, (distance, into) in enumerate([(1, one), (2, two)]):
        rows = slice(head * n, (head + 1) * n)
        for layer in (first.q_proj, first.k_proj, first.v_proj):
            layer.weight[rows] = 0.0
        # With biases alone the score is sum of r^2 cos(rate * (distance to the key - wanted distance)).
        strength = 9.0 * torch.linspace(1.0, 0.2, c)
        first.q_proj.bias[rows] = torch.cat([strength, torch.zeros(c)])
        first.k_proj.bias[rows] = torch.cat([strength * torch.cos(distance * rates), strength * torch.sin(distance * rates)])
        first.v_proj.weight[rows][:c, own] = code
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[into, head * n : head * n + c] = std * torch.eye(c)
    parts = min(config.num_attention_heads, (d - 2 * c) // n)
    match = 2.2
    for head in range(parts):
        rows = slice(head * n, (head + 1) * n)
        for layer in (second.q_proj, second.k_proj, second.v_proj):
            layer.weight[rows] = 0.0
        second.q_proj.weight[rows][:c, own] = match * code
        second.q_proj.weight[rows][c:, one] = match * torch.eye(c)
        second.k_proj.weight[rows][:c, one] = match * torch.eye(c)
        second.k_proj.weight[rows][c:, two] = match * torch.eye(c)
        second.v_proj.weight[rows][:, own] = basis[head * n : (head + 1) * n]
        second.o_proj.weight[:, rows] = 0.0
        second.o_proj.weight[own, rows] = 4 * std * basis[head * n : (head + 1) * n].T


def pretrain(corpus: Corpus, out: Path, work: Path, settings: PretrainSettings, start: Path | None = None) -> PretrainReport:
    """Train tokenizer and base, and write them to `out` in Hugging Face's layout.

    start: a base that `pretrain` made, to train on from, with its tokenizer; `settings` are those of trained_on then. `work` keeps the checkpoint of a
    run that is cut off; calling again goes on from it. `out` is replaced only when everything is written.
    """
    before = facts_of(start) if start else {}
    composer = Composer(corpus, settings.seed)
    digest = corpus.digest
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        # How it was loaded is not part of it.
        for key in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(key, None)
        model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    else:
        sample = [composer.example(i) for i in range(6000)]
        texts = [t for e in sample for t in (e.document, e.answer, *(m.content for m in e.messages))]
        tokenizer = build_tokenizer(texts, settings.vocab)
        tokenizer.model_max_length = settings.context_tokens
        model = build_model(settings, tokenizer).to(device)
    history = train(
        model,
        ComposedBatches(composer, tokenizer, settings.steps, settings.rows, longest=settings.context_tokens),
        LoopSettings(lr=settings.lr, weight_decay=0.05, save_every_steps=100, seed=settings.seed),
        pad_id=tokenizer.pad_token_id,
        checkpoint=work / "pretrain.safetensors",
        identity={"pretrain": asdict(settings), "corpus": digest} | ({"start": before} if start else {}),
        title="pretrain",
    )
    unseen = Composer(corpus, HELD_OUT_SEED, held_out=True)
    loss = mean_loss(model, [encode(tokenizer, unseen.example(i), settings.context_tokens) for i in range(200)], tokenizer.pad_token_id)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report = PretrainReport(sum(p.numel() for p in model.parameters()), history, loss, digest, hardware)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to("cpu", torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    tokens = history.tokens + before.get("tokens_seen", 0)
    facts = {"settings": asdict(settings), "parameters": report.parameters, "tokens_seen": tokens, "corpus": digest}
    facts |= {
        "final_loss": sum(history.losses[-50:]) / len(history.losses[-50:]),
        "held_out_loss": loss,
        "hardware": hardware,
        "seconds": round(history.seconds),
    }
    if start:
        facts["before"] = before
    (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    (work / "pretrain.safetensors").unlink(missing_ok=True)
    return report


def trained_on(start: Path, settings: PretrainSettings) -> PretrainSettings:
    """The settings to train a base on with: of its size, at a lower rate, on examples that it has not seen."""
    own = PretrainSettings(**facts_of(start)["settings"])
    return replace(own, steps=settings.steps, rows=settings.rows, lr=LR_ON, seed=own.seed + 2)


def facts_of(base: Path) -> dict[str, Any]:
    """How a base was made. Raises InputError where it is none that `pretrain` made."""
    try:
        facts: dict[str, Any] = json.loads((base / "training.json").read_text(encoding="utf-8"))
        PretrainSettings(**facts["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--from: {base} is no base that `pretrain` made; give the folder that holds its training.json") from None
    return facts


def pretrain_tracked(config: Config, out: Path | None, steps: int | None, start: Path | None = None) -> None:
    """`deskroute pretrain`: pretrain() with an MLflow run, into `out` or base/ in the state folder."""
    from pipelines import plots
    from pipelines.tracking import PERSONA_EXPERIMENT, Tracker

    settings = PretrainSettings() if steps is None else PretrainSettings(steps=steps)
    if start:
        settings = trained_on(start, settings)
    corpus = Corpus(config.corpus or CORPUS, tuple(p.id for p in config.catalogue()))
    out = (out or config.state / "base").absolute()
    if out.exists() and not (out.is_dir() and ((out / "training.json").is_file() or not any(out.iterdir()))):
        raise InputError(f"--out: {out} holds something else than a base that `pretrain` made and would be replaced; give another folder")
    tracker = Tracker(config.registry_uri, config.state / "artifacts")
    tags = {"stage": "pretrain", "mlflow.runColor": "#444444"}
    description = f"The base of {start}, trained on." if start else "The built-in base, from scratch."
    with tracker.run(PERSONA_EXPERIMENT, "pretrain", tags=tags, params=asdict(settings), description=description) as run:
        report = pretrain(corpus, out, config.state / "work", settings, start)
        run.series({"train/loss": report.history.losses})
        run.metrics({"eval/loss": report.held_out_loss, "train/tokens": report.history.tokens, "train/seconds": report.history.seconds})
        run.figure(plots.losses(report.history.losses, "Pre-training", "#444444", report.held_out_loss), "plots/loss.png")
    print(f"{report.parameters / 1e6:.1f} M parameters, {report.history.tokens / 1e6:.1f} M tokens, held-out loss {report.held_out_loss:.3f}: {out}")
    print(f"to use it, set `base: {out}` in deskroute.yaml and run `deskroute retrain all`")
