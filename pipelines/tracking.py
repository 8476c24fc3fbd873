"""The only writer of MLflow: runs, metrics, datasets, tables, logged models, registered versions and aliases.

Adapters are logged as raw models: MLflow's transformers flavour re-loads wrong weights for a PEFT model. Metrics are written in batches, since one by
one they take 20 ms each. This file knows nothing of training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_models.errors import RegistryError, WorkError
from persona_models.registry import CHALLENGER, CHAMPION, DIGEST_TAG, PREVIOUS, folder_digest

PERSONA_EXPERIMENT = "deskroute-personas"
ROUTER_EXPERIMENT = "deskroute-router-training"
NOTES = {
    PERSONA_EXPERIMENT: "One run per fine-tuning of a persona; compare them in the chart view.\n\neval/loss is nats per answer token on prompts by authors "
    "that training never saw, eval/gain the improvement over the base in percent.",
    ROUTER_EXPERIMENT: "One run per training of the router: persona classifier, in-domain score and knowledge index.",
}
# The link of a fresh browser into the classic view; without it MLflow 3 opens its tracing pages, which are empty here.
WORKFLOW = "workflowType=machine_learning"


class Tracker:
    """Writes to one tracking server or store. Raises RegistryError when it cannot be reached."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        spec = importlib.util.find_spec("mlflow")
        if spec is None or spec.origin is None:
            # The folder mlflow/ of a checkout imports as an empty namespace package where MLflow is not installed.
            raise WorkError("MLflow is not installed in this environment; install deskroute with pip, or run `make serve` once")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow
        from mlflow import MlflowClient

        self.uri = uri
        self._artifacts = artifacts
        self._mlflow = mlflow
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        self.client = MlflowClient(uri, uri)

    def experiment(self, name: str) -> str:
        """Id of an experiment, made where it is missing. A local store keeps its artefacts in the state folder."""
        try:
            found = self.client.get_experiment_by_name(name)
            if found:
                return str(found.experiment_id)
            place = (self._artifacts / name).absolute().as_uri() if self.uri.startswith("sqlite:///") else None
            return str(self.client.create_experiment(name, artifact_location=place, tags={"mlflow.note.content": NOTES.get(name, "")}))
        except Exception as e:
            raise RegistryError(f"MLflow at {self.uri} cannot be used: {str(e).strip().splitlines()[0]}") from None

    @contextlib.contextmanager
    def run(self, experiment: str, name: str, *, tags: Mapping[str, str], params: Mapping[str, Any], description: str = "") -> Iterator[Run]:
        """A run that ends FINISHED, or FAILED when the block raises."""
        experiment_id = self.experiment(experiment)
        whole = {**tags, "mlflow.note.content": description}
        run = self.client.create_run(experiment_id, run_name=name, tags=whole)
        handle = Run(self, run.info.run_id, experiment_id)
        handle.params(params)
        try:
            yield handle
        except BaseException:
            self.client.set_terminated(handle.id, "FAILED")
            raise
        self.client.set_terminated(handle.id, "FINISHED")

    def register(self, run: Run, model: str, folder: Path, *, metrics: Mapping[str, float], description: str, tags: Mapping[str, str]) -> str:
        """Log a folder as a raw model of the run, register it, and point the alias `challenger` at it. Returns the version."""
        logged = self.client.create_logged_model(run.experiment_id, name=model, source_run_id=run.id, model_type="adapter", tags=dict(tags))
        self.client.log_model_artifacts(logged.model_id, str(folder))
        self.client.finalize_logged_model(logged.model_id, "READY")
        stamp = int(time.time() * 1000)
        entity = self._mlflow.entities
        values = [entity.Metric(k, float(v), stamp, 0, model_id=logged.model_id, run_id=run.id) for k, v in metrics.items()]
        self.client.log_batch(run.id, metrics=values)
        with contextlib.suppress(self._mlflow.exceptions.MlflowException):
            self.client.create_registered_model(model, description=f"Deskroute: {model}. Serving reads the alias {CHAMPION}.")
        made = self.client.create_model_version(
            model,
            logged.artifact_location,
            run_id=run.id,
            model_id=logged.model_id,
            description=description,
            tags={**tags, DIGEST_TAG: folder_digest(folder)},
        )
        version = str(made.version)
        self.client.set_registered_model_alias(model, CHALLENGER, version)
        return version

    def promote(self, model: str, version: str, champion: str | None) -> None:
        """Make `version` the champion; the champion until now becomes `previous`."""
        if champion and champion != version:
            self.client.set_registered_model_alias(model, PREVIOUS, champion)
        self.client.set_registered_model_alias(model, CHAMPION, version)
        if self._alias(model, CHALLENGER) == version:
            self.client.delete_registered_model_alias(model, CHALLENGER)

    def roll_back(self, model: str, champion: str, previous: str | None) -> None:
        """Make `previous` the champion again; None withdraws the champion, so that serving uses what ships."""
        if previous:
            self.client.set_registered_model_alias(model, CHAMPION, previous)
            self.client.delete_registered_model_alias(model, PREVIOUS)
        else:
            self.client.delete_registered_model_alias(model, CHAMPION)
        self.client.set_model_version_tag(model, champion, "deskroute.rolled_back", time.strftime("%Y-%m-%d %H:%M:%S"))

    def annotate(self, model: str, version: str, description: str) -> None:
        self.client.update_model_version(model, version, description=description)

    def _alias(self, model: str, alias: str) -> str | None:
        found = self.client.get_registered_model(model).aliases.get(alias)
        return str(found) if found else None


class Run:
    """One run being written."""

    def __init__(self, tracker: Tracker, run_id: str, experiment_id: str) -> None:
        self.tracker, self.id, self.experiment_id = tracker, run_id, experiment_id

    def params(self, params: Mapping[str, Any]) -> None:
        entity = self.tracker._mlflow.entities
        self.tracker.client.log_batch(self.id, params=[entity.Param(k, str(v)[:500]) for k, v in params.items() if v is not None])

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Metrics with one value each."""
        self.series({k: [v] for k, v in metrics.items()})

    def series(self, series: Mapping[str, Sequence[float]], *, first_step: int = 0) -> None:
        """Metrics by step."""
        entity, stamp = self.tracker._mlflow.entities, int(time.time() * 1000)
        points = [entity.Metric(k, float(v), stamp, first_step + i) for k, values in series.items() for i, v in enumerate(values)]
        for i in range(0, len(points), 1000):
            self.tracker.client.log_batch(self.id, metrics=points[i : i + 1000])

    def dataset(self, rows: Sequence[Mapping[str, Any]], name: str, context: str, source: str) -> None:
        """A dataset input. Runs that are to be compared share the name of their evaluation set."""
        import pandas
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.pandas_dataset import from_pandas
        from mlflow.entities import DatasetInput, InputTag

        data = from_pandas(pandas.DataFrame(rows), source=CodeDatasetSource({"mlflow.source.name": source}), name=name)
        tag = InputTag("mlflow.data.context", context)
        self.tracker.client.log_inputs(self.id, [DatasetInput(data._to_mlflow_entity(), [tag])])

    def table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        self.tracker.client.log_table(self.id, {k: list(v) for k, v in columns.items()}, file)

    def figure(self, figure: Any, file: str) -> None:
        self.tracker.client.log_figure(self.id, figure, file)

    def text(self, text: str, file: str) -> None:
        self.tracker.client.log_text(self.id, text, file)

    def files(self, folder: Path, into: str) -> None:
        self.tracker.client.log_artifacts(self.id, str(folder), into)

    def tag(self, key: str, value: str) -> None:
        self.tracker.client.set_tag(self.id, key, value)
