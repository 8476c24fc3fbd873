"""How fast the engine is, in this run on this machine, beside the other ways to serve several adapters.

Every way gives the same answers' length to the same prompts; ways take turns, so that a slow moment of the machine hits all alike. Needs torch,
transformers and peft alone. One thread at a time computes: a second pool of OpenMP threads in the process would slow the first (see PersonaEngine).
"""

from __future__ import annotations

import asyncio
import statistics
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
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from persona_models.adapters import Adapter, builtin_adapter, read_adapter
from persona_models.base_model import BaseModel, load_base
from persona_models.engine import PersonaEngine
from persona_models.gated_lora import Merge, linear_shape
from persona_models.prompt import encode_prompt
from persona_models.protocol import BUILTIN, GenerateRequest, Message
from pipelines import bench_llamacpp
from pipelines.bench import PROMPTS

ARTICLE = """Article: VPN connection does not come up
Cause: Most often the network in between blocks the tunnel, or the client still holds an old session.
1. Quit the VPN client from the tray icon and start it again.
2. Choose Main gateway and sign in with your current password.
3. If the sign-in page does not open, switch to the phone's hotspot and try again.
4. Restart the computer once, so that the old session is dropped, and connect before anything else.
5. Still no tunnel: note the time and the error text.
Note: No usable Wi-Fi: turn on the phone's hotspot, connect the laptop to it and try again; work that must not wait can be done offline.
Desk: If it still fails, call the service desk on 4357 and read out the error text."""
STAGGER_S = 0.002
PERSONAS = 5
FURTHER = 16
RANK = 8


@dataclass
class Timing:
    """One run of one way: seconds in all, to each answer's first token, and per further token."""

    total_s: float
    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)


Way = Callable[[int], Timing]  # concurrent requests -> what they took


@dataclass(frozen=True)
class Scale:
    """What is run on one base: tokens an answer, loads, rounds that count (one more warms up)."""

    tokens: int
    loads: tuple[int, ...]
    rounds: int


class Contest:
    """One base, its adapters, and every way to serve them. Close it to drop the models."""

    def __init__(self, spec: str, dtype: str, tokens: int, threads: int) -> None:
        self.tokens, self.threads = tokens, threads
        self.base: BaseModel = load_base(spec, dtype=dtype)
        self.base.stop_ids = frozenset()  # every answer as long as asked, so that all ways do the same work
        self.spec, self.dtype = spec, dtype
        self.shipped = [f for p in ("leadership", "knowledge_worker", "field", "admin", "new_hire") if spec == BUILTIN and (f := builtin_adapter(p))]
        self.adapters = [read_adapter(f, self.base) for f in self.shipped]
        self.adapters += [made_up(self.base, seed) for seed in range(len(self.adapters), FURTHER)]

    # -- ours --------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def engine(self, personas: int, *, merged: bool = False) -> Iterator[PersonaEngine]:
        """A running engine with adapters p0, p1 ..."""
        engine = PersonaEngine(self.base, max_rows=64, max_queue=64, merged="p0" if merged else None, threads=self.threads)
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
            return asyncio.run(self._ask(engine, n, gate_of))

        return run

    async def _ask(self, engine: PersonaEngine, n: int, gate_of: Callable[[int], dict[str, float]]) -> Timing:
        timing = Timing(0.0)

        async def one(i: int) -> None:
            await asyncio.sleep(STAGGER_S * i)
            asked = time.perf_counter()
            request = GenerateRequest(str(i), _messages(i), gate_of(i), ARTICLE, self.tokens)
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
                part = self._generated(use(p), range(p, n, PERSONAS), n, {})
                whole.first_s += [whole.total_s + s for s in part.first_s]
                whole.token_s += part.token_s
                whole.total_s += part.total_s
            return whole

        return run

    def _generated(self, model: Any, which: Sequence[int], n: int, kwargs: dict[str, Any]) -> Timing:
        ids = [encode_prompt(self.base.tokenizer, _messages(i), document=ARTICLE) for i in which]
        batch = self.base.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(self.base.device)
        steps: list[float] = []

        def clock(_: Tensor, scores: Tensor) -> Tensor:
            steps.append(time.perf_counter())
            return scores

        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                **batch,
                min_new_tokens=self.tokens,
                max_new_tokens=self.tokens,
                do_sample=False,
                logits_processor=[clock],
                eos_token_id=None,
                **kwargs,
            )
        ended = time.perf_counter()
        return Timing(ended - began, [steps[0] - began] * len(ids), [(steps[-1] - steps[0]) / max(1, len(steps) - 1)] * len(ids))

    def continuous(self, model: Any) -> Way:
        """transformers' own continuous batching, on the base."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=self.tokens, do_sample=False, eos_token_id=-1, pad_token_id=self.base.tokenizer.pad_token_id)

        def run(n: int) -> Timing:
            ids = [encode_prompt(self.base.tokenizer, _messages(i), document=ARTICLE) for i in range(n)]
            began = time.perf_counter()
            model.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
            return Timing(time.perf_counter() - began)

        return run

    def llamacpp(self, stack: ExitStack, rows: int) -> dict[str, Way]:
        """llama.cpp's server, which runs until `stack` is closed; its workers wait for requests without computing."""
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(bench_llamacpp.server(self.base, self.adapters[:PERSONAS], folder, self.threads, rows))

        def way(mixed: bool) -> Way:
            def run(n: int) -> Timing:
                prompts = [encode_prompt(self.base.tokenizer, _messages(i), document=ARTICLE) for i in range(n)]
                began = time.perf_counter()
                said = bench_llamacpp.answers(url, prompts, [i % PERSONAS if mixed else None for i in range(n)], self.tokens)
                total = time.perf_counter() - began
                per_token = [a["timings"]["predicted_per_token_ms"] / 1000 for a in said]
                return Timing(total, [a["took_s"] - s * (self.tokens - 1) for a, s in zip(said, per_token, strict=True)], per_token)

            return run

        return {"llama.cpp's server, base": way(False), "llama.cpp's server, five mixed": way(True)}

    def bytes_per_token(self) -> float:
        """What one row's decode step must read: every weight but the embeddings it does not look up, and keys and values of the row so far."""
        model, config = self.base.model, self.base.model.config
        weights = sum(
            p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name or config.tie_word_embeddings
        )
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        prompt = len(encode_prompt(self.base.tokenizer, _messages(0), document=ARTICLE))
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize * (prompt + self.tokens / 2)
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


def bench_engine(config: Any, spec: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Tokens a second of every way at every load, medians; and notes on what was left out and why.

    On a CPU: the configured base, and a Llama of 100 M parameters with random weights. On a GPU: the shapes of Qwen2.5-0.5B and 7B in bfloat16.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    try:
        for name, folder, scale in _bases(spec or config.base):
            rows += _contest(name, folder, config.dtype, scale, threads, notes)
    finally:
        torch.set_num_threads(threads)
    return rows, notes


def _bases(spec: str) -> Iterator[tuple[str, str, Scale]]:
    with tempfile.TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            yield spec, spec, Scale(64, (1, 16, 64), 3)
            for name in ("qwen2.5-0.5b", "qwen2.5-7b"):
                yield f"{name}, random", save_random(name, Path(folder) / name), Scale(64, (1, 16, 64), 2)
        else:
            yield spec, spec, Scale(128, (1, 4, 16, 64), 3)
            yield "llama-100m, random", save_random("llama-100m", Path(folder) / "llama"), Scale(16, (1, 4, 16), 2)


def _contest(name: str, spec: str, dtype: str, scale: Scale, threads: int, notes: list[str]) -> list[dict[str, Any]]:
    contest = Contest(spec, dtype, scale.tokens, threads)
    found: dict[str, dict[int, list[Timing]]] = {}
    plain, peft_model = contest.model(), contest.peft()
    dedicated = [contest.merged(i) for i in range(PERSONAS)]

    def switched(p: int) -> Any:
        peft_model.set_adapter(f"p{p}")
        return peft_model

    others: dict[str, Way] = {
        "generate, base": contest.generate(plain),
        "peft adapter_names, five mixed": contest.generate(peft_model, adapter_names=lambda n: [f"p{i % PERSONAS}" for i in range(n)]),
        "peft, switching": contest.by_persona(switched),
        "five merged models": contest.by_persona(lambda p: dedicated[p]),
        "transformers continuous batching, base": contest.continuous(plain),
    }
    with ExitStack() as stack:
        if why := bench_llamacpp.missing(contest.base):
            notes.append(f"{name}: left out llama.cpp's server ({why})")
        else:
            others |= contest.llamacpp(stack, max(scale.loads))
        _take_turns(name, contest, scale, threads, others, found, notes)
    rows = _table(name, scale, found)
    if contest.base.device.type == "cuda":
        alone = next(r for r in rows if r["way"] == "engine, base" and r["requests"] == 1)
        alone["of memory's speed"] = round(contest.bytes_per_token() / copy_bytes_per_s(contest.base.device) / (alone["per token p50 ms"] / 1000), 3)
    return rows


def _take_turns(
    name: str,
    contest: Contest,
    scale: Scale,
    threads: int,
    others: dict[str, Way],
    found: dict[str, dict[int, list[Timing]]],
    notes: list[str],
) -> None:
    bar = tqdm(total=(scale.rounds + 1) * len(scale.loads) * (len(others) + 5), desc=name, unit="run")

    def note(way: str, n: int, round_: int, timing: Timing) -> None:
        bar.update()
        if round_:  # the first round warms up
            found.setdefault(way, {}).setdefault(n, []).append(timing)

    for round_ in range(scale.rounds + 1):
        for n in scale.loads:
            with contest.engine(FURTHER) as engine:
                for way, gate_of in {
                    "engine, base": lambda i: {},
                    "engine, five mixed": lambda i: {f"p{i % PERSONAS}": 1.0},
                    "engine, sixteen mixed": lambda i: {f"p{i % FURTHER}": 1.0},
                    "engine, mixtures of two": lambda i: {f"p{i % PERSONAS}": 0.6, f"p{(i + 1) % PERSONAS}": 0.4},
                }.items():
                    note(way, n, round_, contest.ours(engine, gate_of)(n))
            with contest.engine(1, merged=True) as engine:
                note("engine, merged", n, round_, contest.ours(engine, lambda i: {"p0": 1.0})(n))
            for way, run in list(others.items()):
                try:
                    note(way, n, round_, _computing(threads, run, n))
                except Exception as e:  # one library's fault must not lose everybody's figures
                    notes.append(f"{name}: left out {way} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
                    del others[way]
    bar.close()


def _table(name: str, scale: Scale, found: dict[str, dict[int, list[Timing]]]) -> list[dict[str, Any]]:
    rate = {way: {n: statistics.median(n * scale.tokens / t.total_s for t in ts) for n, ts in by_load.items()} for way, by_load in found.items()}
    rows = []
    for way, by_load in found.items():
        for n, timings in by_load.items():
            row: dict[str, Any] = {"base": name, "way": way, "requests": n, "tokens/s": round(rate[way][n], 1)}
            row["of engine's base"] = round(rate[way][n] / rate["engine, base"][n], 3)
            for label, values in (("first token", [s for t in timings for s in t.first_s]), ("per token", [s for t in timings for s in t.token_s])):
                row |= {f"{label} {q} ms": round(1000 * v, 2) for q, v in _quantiles(values).items()}
            rows.append(row)
    return rows


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {"p50": ranked[len(ranked) // 2], "p95": ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))]} if ranked else {}


def _computing(threads: int, run: Way, n: int) -> Timing:
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


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by copying half a gigabyte; the best of ten."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = max(best, 2 * source.numel() * source.element_size() / (time.perf_counter() - began))
    return best


def _messages(i: int) -> tuple[Message, ...]:
    return (Message("user", f"{PROMPTS[i % len(PROMPTS)]} ({i})"),)


def made_up(base: BaseModel, seed: int) -> Adapter:
    """An adapter of random numbers on every linear layer of the base but its head."""
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
