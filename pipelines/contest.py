"""The ways to serve several adapters of one base: the engine's, peft's, transformers', llama.cpp's, all giving each prompt's answer the same length.

Needs torch, transformers and peft alone. One thread at a time computes: a second pool of OpenMP threads in the process would slow the first (see
PersonaEngine).
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from persona_models.adapters import Adapter, builtin_adapter, read_adapter
from persona_models.base_model import BaseModel, load_base
from persona_models.engine import PersonaEngine
from persona_models.errors import WorkError
from persona_models.gated_lora import Merge, linear_shape
from persona_models.lookup import Said
from persona_models.prompt import encode_prompt
from persona_models.protocol import BUILTIN, GenerateRequest, Message
from pipelines import bench_llamacpp
from pipelines.workload import REQUESTS, articles

STAGGER_S = 0.002
PERSONAS = 5
FURTHER = 16
# Ways of the engine without guesses and without remembered prompts: what its steps cost, whatever the texts.
BARE = ", bare"
RANK = 8
PAGE_TOKENS = 256


@dataclass
class Timing:
    """One run of one way: seconds in all, to each answer's first token, and per further token."""

    total_s: float
    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)


Way = Callable[[int], Timing]  # concurrent requests -> what they took


class Contest:
    """One base, its adapters, and every way to serve them. Close it to drop the models."""

    def __init__(self, spec: str, dtype: str, tokens: int | None, threads: int, *, bare: bool = False) -> None:
        """tokens: of every answer; None: as many as each request's answer has, so that a static batch runs until its longest has ended.

        bare: the engine guesses no tokens and remembers no prompts, whichever way it is used.
        """
        self.lengths = [tokens or asked.tokens for asked in REQUESTS]
        self.threads, self.bare = threads, bare
        self.base: BaseModel = load_base(spec, dtype=dtype)
        self.base.stop_ids = frozenset()  # every answer as long as asked for, so that all ways do the same work
        self.spec, self.dtype = spec, dtype
        self.shipped = [f for asked in REQUESTS[:PERSONAS] if spec == BUILTIN and (f := builtin_adapter(asked.persona))]
        self.adapters = [read_adapter(f, self.base) for f in self.shipped]
        # The engine knows the further ones from the first by nothing but their names, and their answers are as sensible.
        self.adapters = [self.adapters[i % len(self.adapters)] if self.adapters else made_up(self.base, i) for i in range(FURTHER)]
        self.articles = articles()

    def tokens(self, n: int) -> int:
        """Tokens of the answers to n requests."""
        return sum(self._length(i) for i in range(n))

    # -- ours --------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def engine(self, personas: int, *, merged: bool = False, bare: bool = False) -> Iterator[PersonaEngine]:
        """A running engine with adapters p0, p1 ..."""
        bare = bare or self.bare
        engine = PersonaEngine(
            self.base,
            max_rows=64,
            max_queue=64,
            merged="p0" if merged else None,
            prefix_mb=0 if bare else 256,
            guess=not bare,
            said=Said(0),  # the prompts are of five kinds: an answer would know the others'
            threads=self.threads,
        )
        for i in range(1 if merged else personas):
            engine.load_adapter(f"p{i}", self.adapters[i], "1")
        try:
            yield engine
        finally:
            asyncio.run(engine.close())
            engine.uninstall()

    def ours(self, engine: PersonaEngine, gate_of: Callable[[int], dict[str, float]]) -> Way:
        """The engine with a gate for each request."""

        def run(n: int) -> Timing:
            if self.base.device.type == "cuda":
                # A server has recorded the shapes of its steps after its first requests; an engine of this run has not. With other articles, as long,
                # so that no prompt of the run itself is remembered.
                for _ in range(2):
                    asyncio.run(self._ask(engine, n, gate_of, [" ".join(reversed(text.split())) for text in self.articles]))
            return asyncio.run(self._ask(engine, n, gate_of, self.articles))

        return run

    async def _ask(self, engine: PersonaEngine, n: int, gate_of: Callable[[int], dict[str, float]], shown: Sequence[str]) -> Timing:
        timing = Timing(0.0)

        async def one(i: int) -> None:
            await asyncio.sleep(STAGGER_S * i)
            asked = time.perf_counter()
            request = GenerateRequest(str(i), _messages(i), gate_of(i), shown[i % len(REQUESTS)], self._length(i))
            first = 0.0
            async for event in engine.generate(request):
                first = first or time.perf_counter()
                last, count = time.perf_counter(), event.completion_tokens
            timing.first_s.append(first - asked)
            timing.token_s.append((last - first) / max(1, count - 1))

        began = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(n)))
        timing.total_s = time.perf_counter() - began
        return timing

    # -- theirs ------------------------------------------------------------------------------------------------------------------------

    def generate(self, model: Any, **kwargs: Any) -> Way:
        """transformers' `generate` on all prompts in one padded batch."""

        def run(n: int) -> Timing:
            return self._generated(model, range(n), n, kwargs | {k: v(n) for k, v in kwargs.items() if callable(v)})

        return run

    def by_persona(self, use: Callable[[int], Any]) -> Way:
        """One `generate` per persona after the other; use(p) gives the model to answer as persona p."""

        def run(n: int) -> Timing:
            whole = Timing(0.0)
            for p in range(min(PERSONAS, n)):
                part = self._generated(use(p), [i for i in range(n) if _persona(i) == p], n, {})
                whole.first_s += [whole.total_s + s for s in part.first_s]
                whole.token_s += part.token_s
                whole.total_s += part.total_s
            return whole

        return run

    def _generated(self, model: Any, which: Sequence[int], n: int, kwargs: dict[str, Any]) -> Timing:
        ids = [self._prompt(i) for i in which]
        longest = max(self._length(i) for i in which)
        batch = self.base.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(self.base.device)
        steps: list[float] = []

        def clock(_: Tensor, scores: Tensor) -> Tensor:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)  # else the prompts would seem to be read in no time
            steps.append(time.perf_counter())
            return scores

        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                **batch,
                min_new_tokens=longest,
                max_new_tokens=longest,
                do_sample=False,
                logits_processor=[clock],
                eos_token_id=None,
                **kwargs,
            )
        ended = time.perf_counter()
        return Timing(ended - began, [steps[0] - began] * len(ids), [(steps[-1] - steps[0]) / max(1, len(steps) - 1)] * len(ids))

    def continuous(self, model: Any) -> Way:
        """transformers' own continuous batching, on the base."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        def run(n: int) -> Timing:
            config = GenerationConfig(
                max_new_tokens=max(self._length(i) for i in range(n)),
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=self.base.tokenizer.pad_token_id,
            )
            limits = None
            if self.base.device.type == "cpu":
                # By itself it takes most of the machine's memory; this holds all requests at once.
                longest = max(len(self._prompt(i)) + self._length(i) for i in range(n))
                limits = ContinuousBatchingConfig(num_blocks=n * (longest // PAGE_TOKENS + 1), page_size=PAGE_TOKENS, max_batch_tokens=4096)
            with model.continuous_batching_context_manager(config, block=True, timeout=5, continuous_batching_config=limits) as manager:
                began = time.perf_counter()
                waiting = {manager.add_request(self._prompt(i), max_new_tokens=self._length(i)) for i in range(n)}
                while waiting:
                    said = manager.get_result(timeout=1)
                    if said and said.is_finished():
                        waiting.remove(said.request_id)
                    elif said is None and not manager.is_running():
                        raise WorkError("transformers' manager stopped")
                return Timing(time.perf_counter() - began)

        return run

    def llamacpp(self, stack: ExitStack, *, mixed: bool) -> Way:
        """llama.cpp's server, which runs until `stack` is closed; between runs it waits without computing. Raises WorkError where there is none."""
        if why := bench_llamacpp.missing(self.base):
            raise WorkError(why)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(bench_llamacpp.server(self.base, self.adapters[:PERSONAS], folder, self.threads, 64))

        def run(n: int) -> Timing:
            prompts, lengths = [self._prompt(i) for i in range(n)], [self._length(i) for i in range(n)]
            began = time.perf_counter()
            said = bench_llamacpp.answers(url, prompts, [_persona(i) if mixed else None for i in range(n)], lengths)
            total = time.perf_counter() - began
            per_token = [a["timings"]["predicted_per_token_ms"] / 1000 for a in said]
            return Timing(total, [a["took_s"] - s * (k - 1) for a, s, k in zip(said, per_token, lengths, strict=True)], per_token)

        return run

    def _prompt(self, i: int) -> list[int]:
        return encode_prompt(self.base.tokenizer, _messages(i), document=self.articles[i % len(REQUESTS)])

    def _length(self, i: int) -> int:
        return self.lengths[i % len(REQUESTS)]

    def bytes_per_token(self) -> float:
        """What one row's decode step must read: every weight but the embeddings it does not look up, and keys and values of the row so far."""
        model, config = self.base.model, self.base.model.config
        weights = sum(
            p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name or config.tie_word_embeddings
        )
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        prompt, answer = len(self._prompt(0)), self._length(0)
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize * (prompt + answer / 2)
        return float(weights + cache)

    def model(self) -> Any:
        """A fresh copy of the base as transformers loads it."""
        return load_base(self.spec, dtype=self.dtype).model

    def merged(self, i: int) -> Any:
        model = self.model()
        Merge(model).apply(self.adapters[i].factors)
        return model

    def peft(self) -> Any:
        """The base with five adapters under peft."""
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            paths = self.shipped[:PERSONAS] or [save_made_up(self.base, Path(folder) / str(i), i) for i in range(PERSONAS)]
            model = PeftModel.from_pretrained(self.model(), str(paths[0]), adapter_name="p0")
            for i, path in enumerate(paths[1:], 1):
                model.load_adapter(str(path), adapter_name=f"p{i}")
        return model.eval()


def _persona(i: int, personas: int = PERSONAS) -> int:
    """Who asks request i: the one whose words it has, of however many."""
    return i % len(REQUESTS) % personas


def _gate(i: int, personas: int) -> dict[str, float]:
    return {f"p{_persona(i, personas)}": 1.0}


def _mixture(i: int) -> dict[str, float]:
    return {f"p{_persona(i)}": 0.6, f"p{(_persona(i) + 1) % PERSONAS}": 0.4}


def _switching(contest: Contest, model: Any) -> Way:
    def use(p: int) -> Any:
        model.set_adapter(f"p{p}")
        return model

    return contest.by_persona(use)


def _five_merged(contest: Contest) -> Way:
    models = [contest.merged(p) for p in range(PERSONAS)]
    return contest.by_persona(lambda p: models[p])


# Name -> what makes the way ready; whatever must be closed again goes onto the stack. Ours are made anew for every run, so that none goes first.
OURS: dict[str, Callable[[Contest, ExitStack], Way]] = {
    "engine, base": lambda c, s: c.ours(s.enter_context(c.engine(PERSONAS)), lambda i: {}),
    "engine, five mixed": lambda c, s: c.ours(s.enter_context(c.engine(PERSONAS)), lambda i: _gate(i, PERSONAS)),
    "engine, sixteen mixed": lambda c, s: c.ours(s.enter_context(c.engine(FURTHER)), lambda i: _gate(i, FURTHER)),
    "engine, mixtures of two": lambda c, s: c.ours(s.enter_context(c.engine(PERSONAS)), _mixture),
    "engine, base" + BARE: lambda c, s: c.ours(s.enter_context(c.engine(PERSONAS, bare=True)), lambda i: {}),
    "engine, five mixed" + BARE: lambda c, s: c.ours(s.enter_context(c.engine(PERSONAS, bare=True)), lambda i: _gate(i, PERSONAS)),
    "engine, sixteen mixed" + BARE: lambda c, s: c.ours(s.enter_context(c.engine(FURTHER, bare=True)), lambda i: _gate(i, FURTHER)),
    "engine, merged": lambda c, s: c.ours(s.enter_context(c.engine(1, merged=True)), lambda i: _gate(0, 1)),
}
THEIRS: dict[str, Callable[[Contest, ExitStack], Way]] = {
    "generate, base": lambda c, s: c.generate(c.model()),
    "peft adapter_names, five mixed": lambda c, s: c.generate(c.peft(), adapter_names=lambda n: [f"p{_persona(i)}" for i in range(n)]),
    "peft, switching": lambda c, s: _switching(c, c.peft()),
    "five merged models": lambda c, s: _five_merged(c),
    "transformers continuous batching, base": lambda c, s: c.continuous(c.model()),
    "llama.cpp's server, base": lambda c, s: c.llamacpp(s, mixed=False),
    "llama.cpp's server, five mixed": lambda c, s: c.llamacpp(s, mixed=True),
}


def computing(threads: int, run: Way, n: int) -> Timing:
    """A run in a thread of its own, which alone may use several cores and gives them back at its end."""
    outcome: list[Timing | BaseException] = []

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            outcome.append(run(n))
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _messages(i: int) -> tuple[Message, ...]:
    return (Message("user", f"{REQUESTS[i % len(REQUESTS)].text} ({i})"),)


def made_up(base: BaseModel, seed: int) -> Adapter:
    """An adapter of random numbers, on every linear layer of the base but its head."""
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and "head" not in name:
            n_in, n_out = linear_shape(module)
            factors[name] = (0.02 * torch.randn(RANK, n_in, generator=random), 0.02 * torch.randn(RANK, n_out, generator=random))
    return Adapter(RANK, factors)


def save_made_up(base: BaseModel, folder: Path, seed: int) -> Path:
    """The same as plain peft saves one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    model.save_pretrained(folder)
    model.unload()
    return folder


def save_random(name: str, folder: Path) -> str:
    """A model of a known shape with random weights and the built-in tokenizer, saved as transformers would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    from persona_models.base_model import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder(BUILTIN))
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    # (hidden, layers, heads, key heads, mlp, vocabulary)
    shapes = {
        "llama-100m": (LlamaConfig, 768, 12, 12, 12, 2048, 16_000),
        "qwen2.5-0.5b": (Qwen2Config, 896, 24, 14, 2, 4864, 151_936),
        "qwen2.5-7b": (Qwen2Config, 3584, 28, 28, 4, 18_944, 152_064),
    }
    kind, hidden, layers, heads, key_heads, mlp, words = shapes[name]
    config = kind(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=mlp,
        max_position_embeddings=2048,
        **ids,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of numbers take a CPU a minute
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Words that the tokenizer does not have are as dear to compute as others but never the likeliest: an answer of them would have no text.
    model.lm_head.weight.data[len(tokenizer) :] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
