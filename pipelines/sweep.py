"""Which settings fine-tune best: every combination of a few, each in a run of its own; the best is then judged like any other version.

The runs are flat and share the tag `sweep`, so that MLflow's charts group them. Knows nothing of gates or the registry.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from persona_models.adapters import read_adapter
from persona_models.base_model import BaseModel
from persona_models.errors import InputError
from persona_models.personas import Persona
from pipelines import plots
from pipelines.dataset import Dataset, Sample
from pipelines.evaluate import persona_row
from pipelines.finetune import CHECKPOINT, finetune
from pipelines.tracking import PERSONA_EXPERIMENT, Run, Tracker
from router.config import Training

# What a name alone stands for: these multiples of the configured value, or these values.
MULTIPLES = {"lr": (0.5, 1, 2), "rank": (0.5, 1, 2), "alpha": (0.5, 1, 2), "rows": (0.5, 1, 2), "steps": (0.5, 1, 2), "epochs": (0.5, 1, 2)}
VALUES = {"method": ("lora", "rslora", "dora"), "target_modules": ("residual", "all-linear")}
MOST = 64
LOSS = "sweep/loss"


@dataclass(frozen=True)
class Trial:
    """One combination: what was varied, and the loss (nats per answer token) on the watched answers."""

    varied: Mapping[str, Any]
    loss: float
    seconds: float
    run_id: str


@dataclass(frozen=True)
class Grid:
    """The combinations of a sweep, as whole training settings."""

    names: tuple[str, ...]
    settings: tuple[Training, ...]

    @classmethod
    def read(cls, text: str, training: Training) -> Grid:
        """`lr,rank` (multiples of the configured values) or `lr=0.002:0.004,rank=8:16`. Raises InputError that names what cannot be varied."""
        axes: dict[str, Sequence[Any]] = {}
        for part in text.split(","):
            name, given, listed = part.strip().partition("=")
            if name not in {*MULTIPLES, *VALUES, "seed"}:
                raise InputError(f"--sweep: {name!r} cannot be varied; {', '.join([*MULTIPLES, *VALUES, 'seed'])} can, for example lr,rank=8:16")
            now = getattr(training, name)
            if given:
                axes[name] = [v.strip() for v in listed.split(":")]
            elif name == "seed":
                axes[name] = [now, now + 1, now + 2]
            elif name in VALUES:
                axes[name] = list(VALUES[name])
            else:
                axes[name] = list(dict.fromkeys(type(now)(max(1, now * m) if isinstance(now, int) else now * m) for m in MULTIPLES[name]))
        settings = []
        for values in itertools.product(*axes.values()):
            varied = dict(zip(axes, values, strict=True))
            try:
                made = Training.model_validate(training.model_dump() | varied)
            except ValidationError as e:
                fault = e.errors()[0]
                raise InputError(f"--sweep: {'.'.join(map(str, fault['loc'][:1]))} is {fault['input']!r}: {fault['msg'].lower()}") from None
            if "rank" in varied and "alpha" not in varied:
                # Their ratio scales what an adapter adds; a sweep of the rank alone leaves it as it is.
                made = made.model_copy(update={"alpha": max(1, round(made.rank * training.alpha / training.rank))})
            settings.append(made)
        if len(settings) > MOST:
            raise InputError(f"--sweep: {len(settings)} combinations are more than {MOST}; name fewer values, for example lr=0.002:0.004")
        return cls(tuple(axes), tuple(settings))

    def varied(self, training: Training) -> dict[str, Any]:
        return {n: getattr(training, n) for n in self.names}


class Sweep:
    """One sweep of one persona, kept in `folder` until `clear`, so that one that was killed goes on where it was."""

    def __init__(self, grid: Grid, base: BaseModel, tracker: Tracker, persona: Persona, folder: Path) -> None:
        self.grid, self.base, self.tracker, self.persona, self.folder = grid, base, tracker, persona, folder
        self.trials: list[Trial] = []
        self.id = ""

    def run(
        self, dataset: Callable[[Training], tuple[Dataset, int]], watch: Sequence[Sample], place: str, work: Path
    ) -> tuple[Training, Mapping[str, str]]:
        """Train every combination and put the checkpoint of the best into `work`, where its training has nothing left to do.

        dataset: training settings -> dataset and steps. watch: the answers whose loss decides. Returns the best settings, and the tags of its run.
        """
        identity = {"base": self.base.digest, "settings": [s.model_dump(mode="json") for s in self.grid.settings]}
        self.id = self._begin(identity)
        for i, training in enumerate(self.grid.settings):
            built, steps = dataset(training)
            trial = self._finished(i, built, steps) or self._train(i, training, built, steps, watch, place)
            self.trials.append(trial)
            print(f"{self.persona.id}: {i + 1} of {len(self.grid.settings)}: {_said(trial.varied)}: loss {trial.loss:.4f}", flush=True)
        best = min(range(len(self.trials)), key=lambda i: self.trials[i].loss)
        print(f"{self.persona.id}: best is {_said(self.trials[best].varied)}", flush=True)
        shutil.copyfile(self.folder / str(best) / CHECKPOINT, work / CHECKPOINT)
        return self.grid.settings[best], {"sweep": self.id}

    def log(self, run: Run) -> None:
        """The trials as a table and a picture of the run that came of them."""
        columns: dict[str, list[Any]] = {n: [t.varied[n] for t in self.trials] for n in self.grid.names}
        run.table({k: [str(v) for v in values] for k, values in columns.items()} | {"loss": [t.loss for t in self.trials]}, "sweep.json")
        run.figure(plots.sweep(columns, [t.loss for t in self.trials], f"{self.persona.title}: sweep", self.persona.colour), "plots/sweep.png")

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, identity: Mapping[str, Any]) -> str:
        """A name for the sweep: that of the one in the folder where it is the same sweep."""
        about = self.folder / "sweep.json"
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
            if found["digest"] == digest:
                return str(found["id"])
        except (OSError, ValueError, KeyError):
            pass
        self.clear()
        self.folder.mkdir(parents=True)
        name = time.strftime("%Y-%m-%d %H:%M")
        about.write_text(json.dumps({"digest": digest, "id": name}) + "\n", encoding="utf-8")
        return name

    def _finished(self, i: int, dataset: Dataset, steps: int) -> Trial | None:
        try:
            found = json.loads((self.folder / str(i) / "trial.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Trial(**found["trial"]) if found["dataset"] == dataset.digest and found["steps"] == steps else None

    def _train(self, i: int, training: Training, dataset: Dataset, steps: int, watch: Sequence[Sample], place: str) -> Trial:
        varied = self.grid.varied(training)
        params = training.model_dump(mode="json", exclude={"epochs", "steps"}) | {"persona": self.persona.id, "steps": steps}
        with self.tracker.run(
            PERSONA_EXPERIMENT,
            f"{self.persona.id}-sweep-{i + 1}",
            tags={"stage": "sweep", "persona": self.persona.id, "sweep": self.id, "mlflow.runColor": self.persona.colour}
            | {"dataset_digest": dataset.digest, "base_digest": self.base.digest},
            params=params,
            description=f"{self.persona.title}: {_said(varied)}.",
            work=f"{place}/{i}",
        ) as run:
            made = finetune(self.base, dataset, training, manner=self.persona.manner, steps=steps, work=self.folder / str(i))
            row = persona_row(self.base, watch, {"this": read_adapter(made.folder, self.base)}, self.persona.manner, training.max_tokens)
            # First of all: MLflow colours its parallel-coordinates plot by the metric that came first.
            run.metrics({LOSS: row["this"], "train/seconds": made.history.seconds})
            run.series({"train/loss": made.history.losses})
        trial = Trial(varied, row["this"], made.history.seconds, run.id)
        about = {"dataset": dataset.digest, "steps": steps, "trial": asdict(trial)}
        (self.folder / str(i) / "trial.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        return trial


def _said(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in varied.items())
