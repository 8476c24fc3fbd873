"""`deskroute bench engine`: how fast and how large the engine is, in this run on this machine, beside the other ways to serve several adapters.

Ways take turns, so that a slow moment of the machine hits all alike.
"""

from __future__ import annotations

import gc
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from persona_models.heap import keep_loaded
from pipelines.contest import BARE, OURS, THEIRS, Contest, Timing, Way, computing, save_random

MEMORY_LOAD = 16
# A run of another way that takes longer is not repeated; one that takes longer still is not tried with more requests.
ONCE_S, GIVE_UP_S = 10.0, 30.0
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RANK = 8


@dataclass(frozen=True)
class Scale:
    """What is run on one base: tokens of every answer (None: as many as each has, see Contest), loads, rounds that count (one more warms up), and whether
    the engine is only run bare."""

    tokens: int | None
    loads: tuple[int, ...]
    rounds: int
    bare: bool = False
    memory: bool = True  # whether every way's memory is measured, in a process of its own each


def bench_engine(config: Any, *only: str) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Base by base: tokens a second of every way at every load, medians; and notes on what was left out and why.

    On a CPU: the configured base, and a Llama of 100 M parameters with random weights. On a GPU: the shapes of Qwen2.5-0.5B and 7B in bfloat16.
    only: the bases whose names begin with one of these.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, folder, scale in _bases(config.base, only):
            notes: list[str] = []
            yield _contest(name, folder, config.dtype, scale, threads, notes), notes
    finally:
        torch.set_num_threads(threads)


def _bases(spec: str, only: Sequence[str] = ()) -> Iterator[tuple[str, str, Scale]]:
    if torch.cuda.is_available():
        own = Scale(None, (1, 16, 64), 3)
        # The larger one fills half of a large GPU several times over; its ways' memory is that of the smaller one, in proportion.
        random = {"qwen2.5-0.5b": Scale(64, (1, 16, 64), 2, bare=True), "qwen2.5-7b": Scale(64, (1, 16, 64), 1, bare=True, memory=False)}
    else:
        own = Scale(None, (1, 4, 16, 64), 2)
        random = {"llama-100m": Scale(32, (1, 4, 16), 1, bare=True)}
    if not only or spec.startswith(tuple(only)):
        yield spec, spec, own
    for name, scale in random.items():
        if not only or name.startswith(tuple(only)):
            with tempfile.TemporaryDirectory() as folder:
                yield f"{name}, random", save_random(name, Path(folder) / name), scale


def _contest(name: str, spec: str, dtype: str, scale: Scale, threads: int, notes: list[str]) -> list[dict[str, Any]]:
    contest = Contest(spec, dtype, scale.tokens, threads, bare=scale.bare)
    ours = {way: build for way, build in OURS.items() if not (scale.bare and way.endswith(BARE))}
    if scale.bare:
        notes.append(f"{name}: random weights say the same over and over, which is easily guessed: every way of the engine is bare")
    found: dict[str, dict[int, list[Timing]]] = {}
    with ExitStack() as stack:
        theirs: dict[str, Way] = {}
        too_slow: set[tuple[str, int]] = set()
        for way, build in THEIRS.items():
            with _noted(name, way, notes):
                theirs[way] = build(contest, stack)
        keep_loaded()  # else a collection hits one way or another
        bar = tqdm(total=(scale.rounds + 1) * len(scale.loads) * (len(ours) + len(theirs)), desc=name, unit="run")
        for round_ in range(scale.rounds + 1):
            for n in scale.loads:
                timings = {}
                for way, build in list(ours.items()):
                    bar.update()
                    with _noted(name, way, notes) as left_out, ExitStack() as own:
                        timings[way] = build(contest, own)(n)
                    if left_out:
                        del ours[way]
                for way, run in list(theirs.items()):
                    bar.update()
                    slowest = max((t.total_s for t in found.get(way, {}).get(n, [])), default=0.0)
                    if slowest > ONCE_S or (way, n) in too_slow:
                        continue
                    with _noted(name, way, notes) as left_out:
                        timings[way] = computing(threads, run, n)
                    if left_out:
                        del theirs[way]
                    elif timings[way].total_s > GIVE_UP_S:
                        too_slow |= {(way, more) for more in scale.loads if more > n}
                for way, timing in timings.items():
                    if round_ or timing.total_s > ONCE_S:  # the first round warms up
                        found.setdefault(way, {}).setdefault(n, []).append(timing)
        bar.close()
        gc.unfreeze()
        theirs.clear()
    _give_memory_back()
    notes += [f"{name}: {way} at {n} requests left out, over {GIVE_UP_S:.0f} s at fewer" for way, n in sorted(too_slow)]
    rows = _table(name, contest, found)
    if contest.base.device.type == "cuda":
        alone = next(r for r in rows if r["way"] == _like("engine, base" + BARE, found) and r["requests"] == 1)
        alone["of memory's speed"] = round(contest.bytes_per_token() / copy_bytes_per_s(contest.base.device) / (alone["per token p50 ms"] / 1000), 3)
    held = {way: _memory_mb(spec, dtype, way, scale, threads) if scale.memory else None for way in found}
    for row in rows:
        if row["requests"] == MEMORY_LOAD and (mb := held[row["way"]]) is not None:
            row["memory MB"] = mb
    return rows


@contextmanager
def _noted(name: str, way: str, notes: list[str]) -> Iterator[list[str]]:
    """One library's fault must not lose everybody's figures: it is written down, and the way is left out."""
    mine: list[str] = []
    try:
        yield mine
    except Exception as e:
        mine.append(f"{name}: left out {way} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
        notes += mine
        _give_memory_back()


def _give_memory_back() -> None:
    """To the GPU's other users: models that are gone, of which some hold themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_mb(spec: str, dtype: str, way: str, scale: Scale, threads: int) -> int | None:
    """What a process takes at its peak to answer MEMORY_LOAD requests this one way, above a process that has only loaded the base.

    On a GPU: the peak of its own memory, the weights of one base included. None where the way keeps its models in another process.
    """
    if "server" in way:
        return None
    spawn = multiprocessing.get_context("spawn")
    inbox: Any = spawn.Queue()
    child = spawn.Process(target=_measure_memory, args=(spec, dtype, way, scale, threads, inbox))
    child.start()
    try:
        while child.is_alive():
            with suppress(queue.Empty):
                return int(inbox.get(timeout=1))
        return None
    finally:
        child.kill()
        child.join()


def _measure_memory(spec: str, dtype: str, way: str, scale: Scale, threads: int, outbox: Any) -> None:
    torch.set_num_threads(1)
    contest = Contest(spec, dtype, scale.tokens, threads, bare=scale.bare)
    before = _status_kb("VmRSS")
    on_gpu = contest.base.device.type == "cuda"
    # Other ways load a base of their own beside the contest's.
    twice = torch.cuda.memory_allocated() if on_gpu and way not in OURS else 0
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # the peak counts from here
    with ExitStack() as stack:
        run = (OURS | THEIRS)[way](contest, stack)
        run(MEMORY_LOAD) if way in OURS else computing(threads, run, MEMORY_LOAD)
        if on_gpu:
            outbox.put((torch.cuda.max_memory_allocated() - twice) / 2**20)
        else:
            outbox.put((_status_kb("VmHWM") - before) / 1024)


def _status_kb(key: str) -> int:
    """A line of Linux's account of this process; 0 elsewhere."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def _table(name: str, contest: Contest, found: dict[str, dict[int, list[Timing]]]) -> list[dict[str, Any]]:
    rate = {way: {n: statistics.median(contest.tokens(n) / t.total_s for t in ts) for n, ts in by_load.items()} for way, by_load in found.items()}
    rows = []
    for way, by_load in found.items():
        for n, timings in by_load.items():
            row: dict[str, Any] = {"base": name, "way": way, "requests": n, "tokens/s": round(rate[way][n], 1)}
            if n in (base := rate.get(_like(way, found), {})):
                row["of engine's base"] = round(rate[way][n] / base[n], 3)
            for label, values in (("first token", [s for t in timings for s in t.first_s]), ("per token", [s for t in timings for s in t.token_s])):
                row |= {f"{label} {q} ms": round(1000 * v, 2) for q, v in _quantiles(values).items()}
            rows.append(row)
    return rows


def _like(way: str, found: Mapping[str, Any]) -> str:
    """The engine on the base, with guesses and remembered prompts where the way has them too."""
    bare = "engine, base" + BARE
    return "engine, base" if bare not in found or (way in OURS and not way.endswith(BARE)) else bare


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {"p50": ranked[len(ranked) // 2], "p95": ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))]} if ranked else {}


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
