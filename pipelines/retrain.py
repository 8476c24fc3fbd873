"""`deskroute retrain`: the ticket's way, stage by stage.

tickets -> dataset -> fine-tune -> evaluate against base and champion -> gates -> MLflow run, registered version, alias -> live
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_models.adapters import builtin_adapter, read_adapter
from persona_models.base_model import BaseModel, load_base
from persona_models.encoder import SentenceEncoder, load_encoder
from persona_models.errors import AdapterError, DeskrouteError, RegistryError, TicketError, WorkError
from persona_models.personas import Persona, read_personas
from persona_models.registry import CHAMPION, ROUTER_MODEL, RegistryReader, model_name
from pipelines import plots
from pipelines.compose import CORPUS, Corpus
from pipelines.dataset import Dataset, build_dataset, corpus_samples
from pipelines.evaluate import persona_matrix
from pipelines.finetune import CHECKPOINT, WATCH_EVERY_STEPS, Finetuned, finetune
from pipelines.imports import Imported, file_digest
from pipelines.judge import BASE, NEW, Judgement, judge
from pipelines.model_card import card, shade
from pipelines.promote import Promoter, faults, read_gates, registered_model, verdict_on
from pipelines.router_corpus import Labelled
from pipelines.sweep import Grid, Sweep
from pipelines.tracking import PERSONA_EXPERIMENT, ROUTER_EXPERIMENT, Run, Tracker
from router.config import Config, Training
from router.feedback import Rating, open_for_reading
from router.knowledge import KnowledgeBase
from router.loading import load_knowledge

# Held-out answers per persona: for the loss, and to generate and show side by side.
VALIDATION = 60
SHOWN = 12
# Of a persona's metrics, those of the line that `deskroute retrain` prints; MLflow has all.
PRINTED = ("eval/loss", "eval/base_loss", "eval/gain", "eval/chrf", "eval/rougeL", "eval/ends", "eval/carried", "eval/grounded", "eval/tokens")


@dataclass
class Outcome:
    """What a retraining came to."""

    name: str
    version: str
    promoted: bool
    faults: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    rivals: dict[str, dict[str, float]] = field(default_factory=dict)  # "base" and "champion" -> their metrics of the same names
    seconds: float = 0.0
    adapter: Path | None = None
    live: str = ""
    data: str = ""  # what it was trained on, in words

    def __str__(self) -> str:
        names = PRINTED if self.name != "router" else [k for k in self.metrics if k.startswith("eval/")]
        shown = ", ".join(f"{k.removeprefix('eval/')} {self.metrics[k]:.3f}" for k in names if k in self.metrics)
        if "eval/delta_low" in self.metrics:
            shown += f"; loss against {'the champion' if 'eval/champion_loss' in self.metrics else 'the base'} {self.metrics['eval/delta']:+.4f}"
            shown += f" (95 %: {self.metrics['eval/delta_low']:+.4f} to {self.metrics['eval/delta_high']:+.4f})"
        state = "champion" if self.promoted else "challenger" + (f" ({'; '.join(self.faults)})" if self.faults else "")
        made_of = f" on {self.data}" if self.data else ""
        return f"{self.name}: version {self.version} is {state}{self.live and ', ' + self.live} after {self.seconds:.0f} s{made_of}; {shown}"


class Retraining:
    """Everything the stages share, loaded once for all personas."""

    def __init__(self, config: Config, *, gates: Path | None = None, server: str | None = None) -> None:
        self.config, self.server = config, server
        self.gates = read_gates(gates)
        self.catalogue = {p.id: p for p in config.catalogue()}
        self.corpus = Corpus(config.corpus or CORPUS, tuple(self.catalogue))
        self.registry = RegistryReader(config.registry_uri, config.state / "cache")
        self.tracker = Tracker(config.registry_uri, config.state / "artifacts")
        store = open_for_reading(config.feedback_url)
        self.ratings: list[Rating] = list(store.ratings()) if store else []

    @cached_property
    def knowledge(self) -> KnowledgeBase:
        """The articles; the router is retrained without the present ones, which may be unreadable and the reason for it."""
        return load_knowledge(self.config)

    @cached_property
    def values(self) -> dict[str, str]:
        """What articles' {slots} are filled with."""
        return {**self.knowledge.values, **self.config.desk.values()}

    @cached_property
    def encoder(self) -> SentenceEncoder | None:
        """The router's sentence encoder, where one is set."""
        return load_encoder(self.config.router.encoder) if self.config.router.encoder else None

    @cached_property
    def base(self) -> BaseModel:
        """The base; the router is retrained without it."""
        return load_base(self.config.base, dtype=self.config.dtype)

    def persona(self, name: str, tickets: Imported | None, *, promote: bool, steps: int | None, grid: Grid | None = None) -> Outcome:
        """Retrain one persona, with the best settings of a grid where one is given. Raises WorkError where another process is at it."""
        began = time.monotonic()
        persona, training = self.catalogue[name], self.config.training
        work = self._work(name)

        def prepare(training: Training) -> tuple[Dataset, int]:
            return self._prepare(name, tickets, steps, training)

        with alone(work, f"retrain {name}"):
            sweep = Sweep(grid, self.base, self.tracker, persona, work / "sweep") if grid else None
            tags = {"stage": "train", "persona": name, "mlflow.runColor": persona.colour}
            if sweep:
                watch = prepare(training)[0].watch or corpus_samples(self.corpus, name, VALIDATION, seed=training.seed + 1, held_out=False)
                training, more = sweep.run(prepare, watch, _place(sweep.folder), work)
                tags |= more
            dataset, steps = prepare(training)
            params = training.model_dump(mode="json", exclude={"epochs", "steps"}) | {"persona": name, "steps": steps, "base": self.config.base}
            rated = dataset.facts.get("feedback", 0)
            data = ("tickets" if tickets else "built-in corpus") + (f", {rated} rated answers" if rated else "")
            params |= {"train_samples": len(dataset.train), "data": data}
            # Not among the parameters, which the compare page takes for axes.
            tags |= {"base_digest": self.base.digest, "dataset_digest": dataset.digest}
            with self.tracker.run(
                PERSONA_EXPERIMENT,
                f"{name}-r{training.rank}-s{training.seed}",
                tags=tags,
                params=params,
                description=f"{persona.title}, {params['data']}, {time.strftime('%Y-%m-%d %H:%M')}.",
                work=_place(work),
            ) as run:
                made = finetune(self.base, dataset, training, manner=persona.manner, steps=steps, work=work)
                verdict = self._judge(persona, training, dataset, made)
                failed = faults(self.gates.persona, verdict.metrics, verdict.rivals)
                outcome = Outcome(name, "", False, failed, verdict.metrics, verdict.rivals, adapter=made.folder, data=data)
                run.table(verdict.samples, "eval_samples.json")
                if verdict.slices:
                    run.table({k: [row.get(k) for row in verdict.slices] for k in verdict.slices[0]}, "eval_slices.json")
                # Before the curve: MLflow colours its parallel-coordinates plot by the metric that came first.
                measured_on = self._log_data(run, dataset)
                facts = {
                    "trained on": f"{len(dataset.train)} answers ({data}), {steps} steps of {training.rows}",
                    "held out": len(dataset.validation),
                    "method": f"{training.method}, rank {training.rank}, seed {training.seed}",
                    "base": f"{self.config.base} {self.base.digest}",
                    "data set": dataset.digest,
                    "run": run.id,
                }
                self._register(run, made.folder, outcome, f"{persona.title}: {persona.who}.", measured_on, facts)
                run.rename(f"{name}-v{outcome.version}-r{training.rank}-s{training.seed}", shade(persona.colour, int(outcome.version)))
                run.series({"train/loss": made.history.losses})
                if made.history.watched:
                    run.series({"train/watched_loss": made.history.watched}, first_step=WATCH_EVERY_STEPS, every=WATCH_EVERY_STEPS)
                run.metrics({"train/tokens": made.history.tokens, "train/seconds": made.history.seconds, "train/steps": len(made.history.losses)})
                loss = verdict.metrics["eval/loss"]
                run.figure(plots.losses(made.history.losses, f"{persona.title}: training loss", persona.colour, loss), "plots/loss.png")
                if sweep:
                    sweep.log(run)
                self._promote(name, outcome, promote)
            (work / CHECKPOINT).unlink(missing_ok=True)
            if sweep:
                sweep.clear()
        outcome.seconds = time.monotonic() - began
        return outcome

    def router(self, *, promote: bool, prompts: Path | None = None) -> Outcome:
        """Retrain the router and the knowledge index. prompts: labelled ones of a company, whose labels are the catalogue's personas."""
        from pipelines.prompts import check_labels, read_prompts
        from pipelines.train_router import train_router

        rows: list[Labelled] = []
        if prompts:
            rows = read_prompts(prompts)
            check_labels(rows, self.config.catalogue(), self._work("router") / "personas.yaml")

        began = time.monotonic()
        work = self._work("router")
        seed = self.config.training.seed
        settings = {"seed": seed, "encoder": self.config.router.encoder or "none"}
        tags = {"stage": "train", "router": "yes", "data": f"{len(rows)} prompts" if rows else "built-in corpus"}
        with (
            alone(work, "retrain router"),
            self.tracker.run(
                ROUTER_EXPERIMENT, f"router-s{seed}", tags=tags, params=settings, description="Router and knowledge index.", work=_place(work)
            ) as run,
        ):
            shipped = tuple(p.id for p in read_personas())
            # Another catalogue than the corpus is of, unless the corpus is a company's own as well.
            others = shipped if rows and self.config.corpus is None and set(shipped) != set(self.catalogue) else ()
            report = train_router(
                self.corpus.folder,
                work / "artefact",
                tuple(self.catalogue),
                seed,
                prompts=rows,
                own_personas=others,
                encoder=self.encoder,
                rival=self._registered(ROUTER_MODEL),
            )
            metrics = _named(report.metrics)
            run.figure(plots.confusion(report.confusion, report.personas, "Persona, held-out authors"), "plots/confusion.png")
            bins = report.reliability
            run.figure(
                plots.reliability(list(bins["confidence"]), list(bins["accuracy"]), [int(n) for n in bins["count"]], "Calibration"),
                "plots/reliability.png",
            )
            if report.coverage:
                run.figure(plots.coverage(report.coverage, "Accuracy against the share that is decided"), "plots/coverage.png")
            if report.errors:
                run.table({k: [str(e.get(k, "")) for e in report.errors] for k in ("kind", "text", "is", "got", "confidence")}, "errors.json")
            run.table({"topic": [c[0] for c in report.retrieval_confusions], "found": [c[1] for c in report.retrieval_confusions],
                       "times": [c[2] for c in report.retrieval_confusions]}, "retrieval_confusions.json")  # fmt: skip
            rivals = {CHAMPION: _named(report.rival)} if report.rival else {}
            outcome = Outcome("router", "", False, faults(self.gates.router, metrics, rivals), metrics, rivals, adapter=work / "artefact")
            self._register(run, work / "artefact", outcome, "Persona classifier, in-domain score and knowledge index.")
            self._promote("router", outcome, promote)
        outcome.seconds = time.monotonic() - began
        return outcome

    def matrix(self, adapters: Mapping[str, Path]) -> Any:
        """The persona matrix over all personas' held-out answers, logged as a heat map. Returns losses (P, 1 + P)."""
        names = list(adapters)
        samples = {p: corpus_samples(self.corpus, p, VALIDATION // 2, seed=self.config.training.seed, held_out=True) for p in names}
        loaded = {p: read_adapter(folder, self.base) for p, folder in adapters.items()}
        values = persona_matrix(self.base, samples, loaded, {p: self.catalogue[p].manner for p in names}, self.config.training.max_tokens)
        tags = {"stage": "matrix"}
        with self.tracker.run(
            PERSONA_EXPERIMENT, "persona-matrix", tags=tags, params={"base": self.config.base}, description="Every adapter on every persona."
        ) as run:
            figure = plots.matrix(values, names, ["base", *names], "Loss on held-out answers (nats per token, against the base)")
            run.figure(figure, "plots/persona_matrix.png")
            run.metrics({f"eval/{p}_own": float(values[i, i + 1]) for i, p in enumerate(names)})
            run.table({"answers of": names} | {c: [float(v) for v in values[:, j]] for j, c in enumerate(["base", *names])}, "persona_matrix.json")
        return values

    def inputs(self, name: str, tickets: Imported | None, prompts: Path | None = None) -> str:
        """A digest of everything that a retraining of `name` is made from: where it is the same, so would be the version."""
        if name == "router":
            facts: dict[str, Any] = {"corpus": self.corpus.digest, "seed": self.config.training.seed, "personas": list(self.catalogue)}
            if prompts:
                if not prompts.is_file():
                    raise TicketError(f"{prompts}: there is no such file")
                facts["prompts"] = file_digest(prompts)
            if self.encoder:
                facts["encoder"] = self.encoder.probe.tolist()
        else:
            with alone(self._work(name), f"retrain {name}"):
                dataset, steps = self._prepare(name, tickets, None, self.config.training)
            facts = {"dataset": dataset.digest, "base": self.base.digest, "steps": steps, "training": self.config.training.model_dump(mode="json")}
            facts["manner"] = self.catalogue[name].manner
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _work(self, name: str) -> Path:
        return self.config.state / "work" / name

    def _prepare(self, name: str, tickets: Imported | None, steps: int | None, training: Training) -> tuple[Dataset, int]:
        """The dataset for some settings, and the optimizer steps on it where none are given."""
        dataset = build_dataset(
            name,
            self._work(name) / "dataset",
            corpus=self.corpus,
            knowledge=self.knowledge,
            values=self.values,
            tickets=tickets,
            ratings=self.ratings,
            corpus_train=training.rows * training.steps,
            corpus_validation=VALIDATION,
            seed=training.seed,
        )
        on_tickets = max(10, round(training.epochs * len(dataset.train) / training.rows))
        return dataset, steps or (training.steps if tickets is None else on_tickets)

    def _judge(self, persona: Persona, training: Training, dataset: Dataset, made: Finetuned) -> Judgement:
        in_force = self.folder_in_force(persona.id)
        candidates = {NEW: read_adapter(made.folder, self.base), BASE: None}
        if in_force:
            candidates[CHAMPION] = read_adapter(in_force, self.base)
        return judge(
            self.base,
            dataset.validation,
            candidates,
            persona=persona.id,
            manner=persona.manner,
            max_tokens=training.max_tokens,
            answer_tokens=self.config.generation.max_tokens,
            no_repeat=self.config.no_repeat,
            shown=SHOWN,
            seed=training.seed,
        )

    def folder_in_force(self, persona: str) -> Path | None:
        """The adapter that serving would use: the registry's champion, else the one that ships; None where neither fits this base."""
        for folder in (self._registered(model_name(persona)), builtin_adapter(persona)):
            try:
                if folder:
                    read_adapter(folder, self.base)
                    return folder
            except AdapterError:
                continue
        return None

    def _registered(self, model: str) -> Path | None:
        """The champion's folder; None where there is none, or one that is not what was registered."""
        try:
            found = self.registry.fetch(model)
        except RegistryError:
            return None
        return found.folder if found else None

    def _log_data(self, run: Run, dataset: Dataset) -> tuple[str, str]:
        """Log what was trained on and judged by; name and digest of the latter."""
        for split, context, name in ((dataset.train, "train", f"{dataset.persona}-train"), (dataset.validation, "eval", "deskroute-eval")):
            rows = [{"prompt": s.messages[-1].content, "answer": s.answer, "source": s.source} for s in split]
            logged = run.dataset(rows, name, context, f"dataset {dataset.digest}")
        run.text((dataset.folder / "manifest.json").read_text(encoding="utf-8"), "dataset/manifest.json")
        return logged

    def _register(
        self,
        run: Run,
        folder: Path,
        outcome: Outcome,
        about: str,
        measured_on: tuple[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        outcome.version = self.tracker.register(
            run,
            registered_model(self.config, outcome.name),
            folder,
            metrics=outcome.metrics,
            about=f"{about} Serving reads the alias {CHAMPION}.",
            description=card(verdict_on(outcome.faults), outcome.metrics, outcome.rivals, facts) if facts else verdict_on(outcome.faults),
            tags={"name": outcome.name},
            measured_on=measured_on,
        )
        run.tag("version", outcome.version)

    def _promote(self, name: str, outcome: Outcome, wanted: bool) -> None:
        """Last of all, so that a version in force is one whose run is whole."""
        if not wanted or outcome.faults:
            return
        try:
            moved = Promoter(self.config, self.server).promote(name, outcome.version)
        except DeskrouteError as e:
            outcome.faults.append(e.message)
        else:
            outcome.promoted, outcome.live = True, moved.live


@contextlib.contextmanager
def alone(work: Path, command: str) -> Iterator[None]:
    """Only one process at a time works in a folder; the system frees the lock when that process ends, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkError(f"another `deskroute {command}` is running on this state folder; wait for it, or stop it") from None
        yield


def _place(work: Path) -> str:
    """A name for a folder of this machine, for a registry that many machines share."""
    return hashlib.sha256(f"{socket.gethostname()}:{work.absolute()}".encode()).hexdigest()[:16]


def export(folder: Path, out: Path) -> None:
    """Copy a finished artefact to where it ships."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """A router's metrics by the names they are logged under."""
    return {f"slice/{k[6:]}" if k.startswith("slice_") else f"eval/{k}": float(v) for k, v in metrics.items()}
