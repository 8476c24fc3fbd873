"""The engine's benchmark on a tiny model: every way runs, does the same work, and is reported; speed itself is never tested."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit import corpora
from unit.encoders import PROBED, random_table

from persona_models.errors import InputError
from pipelines import bench, bench_engine, bench_llamacpp, bench_router
from pipelines.bench_engine import Scale
from pipelines.contest import PERSONAS, Contest, Timing, _persona, computing, save_made_up
from pipelines.router_corpus import read_router_corpus
from pipelines.train_router import fit_classifier
from pipelines.workload import REQUESTS, articles
from router.config import Config, Training
from router.policy import PolicySettings

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
WORDS = sorted({PROBED, *(w for lines in (*corpora.WORK.values(), *corpora.TROUBLE.values()) for line in lines for w in line.split())})
WAYS = {
    "engine, base",
    "engine, five mixed",
    "engine, sixteen mixed",
    "engine, mixtures of two",
    "engine, base, bare",
    "engine, five mixed, bare",
    "engine, merged",
    "generate, base",
    "peft adapter_names, five mixed",
    "peft, switching",
    "five merged models",
}


def test_every_way_answers_and_is_written_down(tmp_path, long_base_folder, monkeypatch, capsys):
    def bases(spec, only):
        yield "tiny", str(long_base_folder), Scale(3, (1, 6), 1)
        yield "random", str(long_base_folder), Scale(3, (1, 6), 1, bare=True)

    monkeypatch.setattr(bench_llamacpp.shutil, "which", lambda name: None)
    monkeypatch.setattr(bench_engine, "_memory_mb", lambda *args: 7)
    monkeypatch.setattr(bench_engine, "MEMORY_LOAD", 6)

    monkeypatch.setattr(bench_engine, "_bases", bases)
    config = SimpleNamespace(base="builtin", dtype="auto", state=tmp_path)
    bench.bench("engine", tmp_path / "engine.json", config)
    written = json.loads((tmp_path / "engine.json").read_text())
    assert any("left out llama.cpp's server, base" in note for note in written["notes"])
    assert {r["way"] for r in written["rows"] if r["base"] == "tiny"} >= WAYS
    for row in written["rows"]:
        assert row["tokens/s"] > 0
        if row["way"] in WAYS:
            assert 0 < row["first token p50 ms"] <= row["first token p95 ms"]
            assert 0 <= row["per token p50 ms"] <= row["per token p95 ms"]
        assert row.get("memory MB") == (7 if row["requests"] == 6 else None)
    alone = {"tiny": {"engine, base", "engine, base, bare"}, "random": {"engine, base"}}
    for base, ways in alone.items():
        assert {r["way"] for r in written["rows"] if r["base"] == base and r["of engine's base"] == 1.0} >= ways
    assert not any("bare" in r["way"] for r in written["rows"] if r["base"] == "random")
    assert any("every way of the engine is bare" in note for note in written["notes"])
    assert (tmp_path / "engine.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "peft, switching" in said
    assert "drawn in" in said


def test_all_ways_give_the_same_tokens(long_base_folder, monkeypatch):
    """What is compared must be the same work: peft's mixed batch and the engine agree on every answer of a mixed batch."""
    contest = Contest(str(long_base_folder), "auto", 6, 1)
    said: dict[str, list[str]] = {"engine": [], "peft": []}
    # Contest gives engine and peft the same random adapters only where they ship, so the engine is given peft's here.
    model = contest.peft()
    from persona_models.adapters import read_adapter

    folder = long_base_folder.parent / "adapters"
    for i in range(2):
        contest.adapters[i] = read_adapter(save_made_up(contest.base, folder / str(i), i), contest.base)
    real = model.generate

    def listen(**kwargs):
        out = real(**kwargs)
        said["peft"] += contest.base.tokenizer.batch_decode(out[:, kwargs["input_ids"].shape[1] :], skip_special_tokens=True)
        return out

    monkeypatch.setattr(model, "generate", listen)
    contest.generate(model, adapter_names=lambda n: [f"p{i % 2}" for i in range(n)])(4)
    with contest.engine(2) as engine:
        ask = engine.generate

        async def overheard(request):
            text = ""
            async for event in ask(request):
                text += event.text
                yield event
            said["engine"].append((int(request.request_id), text))

        monkeypatch.setattr(engine, "generate", overheard)
        timing = contest.ours(engine, lambda i: {f"p{i % 2}": 1.0})(4)
    assert [t for _, t in sorted(said["engine"])] == said["peft"]
    assert len(timing.first_s) == len(timing.token_s) == 4


def test_answers_have_their_own_lengths(long_base_folder, monkeypatch):
    """The engine says as many tokens as each answer has; a static batch as many as its longest, and only the others' own count."""
    contest = Contest(str(long_base_folder), "auto", None, 1)
    own = [asked.tokens for asked in REQUESTS]
    assert contest.tokens(16) == sum(own)
    assert contest.tokens(18) == sum(own) + own[0] + own[1]
    contest.lengths = [3, 5, 2] + [4] * (len(REQUESTS) - 3)
    said: dict[str, int] = {}
    with contest.engine(2) as engine:
        ask = engine.generate

        async def overheard(request):
            async for event in ask(request):
                said[request.request_id] = event.completion_tokens
                yield event

        monkeypatch.setattr(engine, "generate", overheard)
        contest.ours(engine, lambda i: {})(3)
    assert said == {"0": 3, "1": 5, "2": 2}
    model, steps = contest.model(), []
    real = model.generate

    def listen(**kwargs):
        steps.append(kwargs["max_new_tokens"])
        return real(**kwargs)

    monkeypatch.setattr(model, "generate", listen)
    contest.generate(model)(3)
    contest.by_persona(lambda p: model)(3)
    assert steps == [5, 3, 5, 2]


def test_a_request_is_answered_by_its_own_persona():
    corpus_of = {asked.text: asked.persona for asked in REQUESTS}
    assert len(corpus_of) == len(REQUESTS) == 16
    personas = [asked.persona for asked in REQUESTS[:PERSONAS]]
    assert len(set(personas)) == PERSONAS
    for i in range(40):
        assert personas[_persona(i)] == REQUESTS[i % 16].persona
        assert _persona(i, 16) == i % 16
    # What it reads answers it, in its persona's words.
    assert len(set(articles())) == 16
    assert all("4357" in text for text in articles())


def test_a_fault_in_a_computing_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        computing(1, lambda n: Timing(1 / 0), 1)


def test_the_reference_trainer_gets_the_same_work(long_base_folder, tmp_path, capsys):
    """Same samples, steps and configuration: after few steps from the same start, both are where the other is."""
    training = Training(steps=4, rows=2, rank=2, max_tokens=2048)
    config = Config(base=str(long_base_folder), training=training, state=tmp_path)
    bench.bench("finetune", tmp_path / "finetune.json", config)
    ours, theirs = json.loads((tmp_path / "finetune.json").read_text())["rows"]
    assert (ours["trainer"], theirs["trainer"]) == ("deskroute", "transformers' Trainer")
    assert ours["loss of the reference"] == pytest.approx(1, abs=0.02)
    assert theirs["of the reference"] == 1
    # Trained at all: the untouched base is worse.
    assert ours["held-out loss"] < 5.78
    assert "trainer" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(InputError, match="'speed' is not one of router, engine, gateway"):
        bench.bench("speed", None, SimpleNamespace())


def test_memory_is_measured_in_a_process_of_its_own(long_base_folder):
    """Ten megabytes and more: adapters, packed weights and the cache of sixteen rows; far less than the process itself."""
    assert 1 <= bench_engine._memory_mb(str(long_base_folder), "auto", "engine, five mixed", Scale(3, (1,), 1), 1) < 2000
    assert bench_engine._memory_mb(str(long_base_folder), "auto", "llama.cpp's server, base", 3, 1) is None


@pytest.mark.parametrize("encoder", [False, True])
def test_every_router_gets_the_same_prompts_and_is_measured(tmp_path, monkeypatch, capsys, encoder):
    data = read_router_corpus(corpora.write_corpus(tmp_path / "corpus"), corpora.PERSONAS)
    in_force = fit_classifier(data, corpora.PERSONAS)
    monkeypatch.setattr(bench_router, "load_classifier", lambda config: in_force)
    monkeypatch.setattr("router.loading.load_classifier", lambda config: in_force)
    monkeypatch.setattr(bench_router.importlib.util, "find_spec", lambda name: None)
    config = SimpleNamespace(
        catalogue=lambda: [SimpleNamespace(id=p) for p in corpora.PERSONAS],
        corpus=tmp_path / "corpus",
        policy=PolicySettings(),
        state=tmp_path,
        router=SimpleNamespace(encoder=random_table(tmp_path / "encoder", WORDS, dim=16) if encoder else None),
    )
    monkeypatch.setattr("router.loading.load_knowledge", lambda config: SimpleNamespace(best=len))
    bench.bench("router", tmp_path / "router.json", config)
    written = json.loads((tmp_path / "router.json").read_text())
    assert (tmp_path / "router.png").stat().st_size > 10_000
    assert {"left out semantic-router, TF-IDF encoder: semantic_router is not installed"} <= set(written["notes"])
    rows = {r["router"]: r for r in written["rows"] if "router" in r}
    with_encoder = {"15 nearest prompts, sentence encoder", "deskroute, the same prompts, sentence encoder"}
    without = ["always the most frequent", "15 nearest prompts, TF-IDF", "deskroute, the same prompts", "deskroute, as it is in force"]
    assert [name for name in rows if name not in with_encoder] == without
    assert with_encoder & set(rows) == (with_encoder if encoder else set())
    assert ("left out sentence encoders: router.encoder is not set" in written["notes"]) is not encoder
    # Each persona wrote as many held-out prompts.
    assert rows["always the most frequent"]["accuracy"] == pytest.approx(1 / 3, abs=0.01)
    # All of the tiny corpus is training: the same prompts give the same router.
    for name in ("accuracy", "of the decided", "left open", "declined", "strangers declined"):
        assert rows["deskroute, the same prompts"][name] == rows["deskroute, as it is in force"][name]
    assert all(r["prompts/s"] > 0 for r in rows.values())
    assert {r["part"] for r in written["rows"] if "part" in r} == {"persona and in-domain score", "requests in it", "article", "all of it"}
    assert "persona and in-domain score" in capsys.readouterr().out


def test_one_way_that_fails_costs_only_itself(long_base_folder, monkeypatch):
    def fails(contest, stack):
        raise MemoryError("full")

    monkeypatch.setattr(bench_llamacpp.shutil, "which", lambda name: None)
    monkeypatch.setitem(bench_engine.OURS, "engine, mixtures of two", fails)
    monkeypatch.setattr(bench_engine, "_memory_mb", lambda *args: pytest.fail("memory was not asked for"))
    notes = []
    rows = bench_engine._contest("tiny", str(long_base_folder), "auto", Scale(2, (1,), 1, memory=False), 1, notes)
    ways = {row["way"] for row in rows}
    assert "engine, five mixed" in ways
    assert "engine, mixtures of two" not in ways
    assert notes.count("tiny: left out engine, mixtures of two (MemoryError: full)") == 1


def test_some_bases_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(bench_engine, "save_random", lambda name, folder: str(folder))
    assert [name for name, _, _ in bench_engine._bases("builtin")] == ["builtin", "llama-100m, random"]
    assert [name for name, _, _ in bench_engine._bases("builtin", ["llama"])] == ["llama-100m, random"]
    monkeypatch.setattr(bench_engine.torch.cuda, "is_available", lambda: True)
    assert [name for name, _, _ in bench_engine._bases("builtin", ["qwen2.5-7b", "built"])] == ["builtin", "qwen2.5-7b, random"]
