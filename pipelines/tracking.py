"""The only writer of MLflow: runs, metrics, datasets, tables, logged models, registered versions and aliases.

Adapters are logged as raw models: MLflow's transformers flavour re-loads wrong weights for a PEFT model. Metrics are written in batches, since one by
one they take 20 ms each. This file knows nothing of training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_models.errors import RegistryError, WorkError
from persona_models.registry import CHALLENGER, CHAMPION, DIGEST_TAG, PREVIOUS, TRIAL_TAG, folder_digest

# What a run works on; see Tracker.run. And where MLflow's UI looks for tables.
WORK_TAG, TABLES_TAG = "deskroute.work", "mlflow.loggedArtifacts"
ROLLED_BACK_TAG = "deskroute.rolled_back"
PERSONA_EXPERIMENT = "deskroute-personas"
ROUTER_EXPERIMENT = "deskroute-router-training"
NOTES = {
    PERSONA_EXPERIMENT: "One run per fine-tuning of a persona; compare them in the chart view.\n\neval/loss is nats per answer token on prompts by authors "
    "that training never saw, eval/gain the improvement over the base in percent; ends is the share of answers that end by "
    "themselves, carried the share of an article's numbers, menu paths and names that answers have, grounded of "
    "those that answers state that it has.\n\nMany prompts of training and of this measurement "
    "come with an article of exchanged words and steps, so that an answer must be read off the article; in eval_samples.json they look like word salad.",
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
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow
        from mlflow import MlflowClient

        # It tells of its tables when a store is made.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self.uri = uri
        self._artifacts = artifacts
        self._mlflow = mlflow
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            self.client = MlflowClient(uri, uri)
        except Exception as e:
            raise RegistryError(f"MLflow at {uri} cannot be used: {str(e).strip().splitlines()[0]}") from None

    def experiment(self, name: str) -> str:
        """Id of an experiment, made where it is missing. A store without a server keeps its artefacts in the state folder."""
        try:
            found = self.client.get_experiment_by_name(name)
            if found:
                return str(found.experiment_id)
            place = None if self.uri.startswith("http") else (self._artifacts / name).absolute().as_uri()
            return str(self.client.create_experiment(name, artifact_location=place, tags={"mlflow.note.content": NOTES.get(name, "")}))
        except Exception as e:
            raise RegistryError(f"MLflow at {self.uri} cannot be used: {str(e).strip().splitlines()[0]}") from None

    @contextlib.contextmanager
    def run(
        self,
        experiment: str,
        name: str,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        description: str = "",
        work: str | None = None,
    ) -> Iterator[Run]:
        """A run that ends FINISHED, or FAILED when the block raises.

        work: what the run works on, where only one process does at a time. A run that is still RUNNING for it is one whose process was killed: it is
        taken up again where its tags and parameters are the same, so that nothing is there twice, and ended as KILLED where they are others.
        """
        experiment_id = self.experiment(experiment)
        whole = {**tags, "mlflow.note.content": description}
        wanted = {k: str(v)[:500] for k, v in params.items() if v is not None}
        run = None
        if work:
            whole[WORK_TAG] = work
            for left in self.client.search_runs([experiment_id], f"tags.`{WORK_TAG}` = '{work}' and attributes.status = 'RUNNING'"):
                # One that was killed before its parameters were written has none yet.
                if run is None and left.data.params.items() <= wanted.items() and tags.items() <= left.data.tags.items():
                    run = left
                else:
                    self.client.set_terminated(left.info.run_id, "KILLED")
        if run is None:
            run = self.client.create_run(experiment_id, run_name=name, tags=whole)
        handle = Run(self, run.info.run_id, experiment_id, run.info.start_time)
        try:
            handle.params(wanted)
            yield handle
        except BaseException:
            self.client.set_terminated(handle.id, "FAILED")
            raise
        self.client.set_terminated(handle.id, "FINISHED")

    def register(
        self,
        run: Run,
        model: str,
        folder: Path,
        *,
        metrics: Mapping[str, float],
        about: str,
        description: str,
        tags: Mapping[str, str],
        measured_on: tuple[str, str] | None = None,
    ) -> str:
        """Log a folder as a raw model of the run, register it, and point the alias `challenger` at it unless one is on trial. Returns the version.

        about: what the model is, for its page; description: how the version did; measured_on: name and digest of the dataset that the metrics
        are of. What a killed process had done of it already is used, or taken away where it is half done.
        """
        digest = folder_digest(folder)
        with contextlib.suppress(self._mlflow.exceptions.MlflowException):
            self.client.create_registered_model(model, description=about)
        of_run = [v for v in self.client.search_model_versions(f"name = '{model}'") if v.run_id == run.id]
        made = [v for v in of_run if v.tags.get(DIGEST_TAG) == digest]
        aliases = self._aliases(model)
        for v in of_run:
            if v not in made and str(v.version) not in (aliases.get(CHAMPION), aliases.get(PREVIOUS)):
                self.client.delete_model_version(model, v.version)
        logged = self._logged_before(run, digest)
        if logged is None:
            logged = self.client.create_logged_model(
                run.experiment_id, name=model, source_run_id=run.id, model_type="adapter", tags={**tags, DIGEST_TAG: digest}
            )
            self.client.log_model_artifacts(logged.model_id, str(folder))
            logged = self.client.finalize_logged_model(logged.model_id, "READY")
        entity = self._mlflow.entities
        known = {m.key for m in self.client.get_logged_model(logged.model_id).metrics or ()}
        name, data = measured_on or (None, None)
        of = {"model_id": logged.model_id, "run_id": run.id, "dataset_name": name, "dataset_digest": data}
        values = [entity.Metric(k, float(v), run.start_ms, 0, **of) for k, v in metrics.items() if k not in known]
        if values:
            self.client.log_batch(run.id, metrics=values)
        version = made[0] if made else self.client.create_model_version(
            model,
            logged.artifact_location,
            run_id=run.id,
            model_id=logged.model_id,
            description=description,
            tags={**tags, DIGEST_TAG: digest},
        )  # fmt: skip
        # A challenger that is on trial stays one: the trial is of what that alias points to.
        if aliases.get(CHAMPION) != str(version.version) and TRIAL_TAG not in self.client.get_registered_model(model).tags:
            self.client.set_registered_model_alias(model, CHALLENGER, version.version)
        return str(version.version)

    def _logged_before(self, run: Run, digest: str) -> Any:
        """The run's logged model of this digest, if it is whole; others of the run are deleted."""
        whole = None
        for found in self.client.search_logged_models([run.experiment_id], f"source_run_id = '{run.id}'"):
            if str(getattr(found.status, "value", found.status)) == "READY" and found.tags.get(DIGEST_TAG) == digest and whole is None:
                whole = found
            else:
                self.client.delete_logged_model(found.model_id)
        return whole

    def promote(self, model: str, version: str, champion: str | None) -> None:
        """Make `version` the champion; the champion until now becomes `previous`."""
        if champion and champion != version:
            self.client.set_registered_model_alias(model, PREVIOUS, champion)
        self.client.set_registered_model_alias(model, CHAMPION, version)
        if ROLLED_BACK_TAG in self.client.get_model_version(model, version).tags:
            self.client.delete_model_version_tag(model, version, ROLLED_BACK_TAG)
        if self._aliases(model).get(CHALLENGER) == version:
            self.client.delete_registered_model_alias(model, CHALLENGER)

    def roll_back(self, model: str, champion: str, previous: str | None) -> None:
        """Make `previous` the champion again; None withdraws the champion, so that serving uses what ships."""
        if previous:
            self.client.set_registered_model_alias(model, CHAMPION, previous)
            self.client.delete_registered_model_alias(model, PREVIOUS)
        else:
            self.client.delete_registered_model_alias(model, CHAMPION)
        self.tag_version(model, champion, ROLLED_BACK_TAG, time.strftime("%Y-%m-%d %H:%M:%S"))

    def begin_trial(self, model: str, version: str, how: str) -> None:
        """Make `version` the challenger and say how it is tried; the tag comes last, so that a trial is never of the wrong version."""
        self.end_trial(model)
        self.client.set_registered_model_alias(model, CHALLENGER, version)
        self.client.set_registered_model_tag(model, TRIAL_TAG, how)

    def end_trial(self, model: str) -> None:
        if TRIAL_TAG in self.client.get_registered_model(model).tags:
            self.client.delete_registered_model_tag(model, TRIAL_TAG)

    def restore(self, model: str, aliases: Mapping[str, str], trial: str | None) -> None:
        """Put a model's aliases and trial back to what they were."""
        now = self._aliases(model)
        for alias in (PREVIOUS, CHALLENGER, CHAMPION):
            if alias in aliases and now.get(alias) != aliases[alias]:
                self.client.set_registered_model_alias(model, alias, aliases[alias])
            elif alias in now and alias not in aliases:
                self.client.delete_registered_model_alias(model, alias)
        self.end_trial(model)
        if trial:
            self.client.set_registered_model_tag(model, TRIAL_TAG, trial)

    def describe(self, model: str, version: str, description: str) -> None:
        self.client.update_model_version(model, version, description)

    def tag_version(self, model: str, version: str, key: str, value: str) -> None:
        self.client.set_model_version_tag(model, version, key, value)

    def _aliases(self, model: str) -> dict[str, str]:
        return {k: str(v) for k, v in self.client.get_registered_model(model).aliases.items()}


class Run:
    """One run being written."""

    def __init__(self, tracker: Tracker, run_id: str, experiment_id: str, start_ms: int) -> None:
        self.tracker, self.id, self.experiment_id, self.start_ms = tracker, run_id, experiment_id, start_ms

    def params(self, params: Mapping[str, Any]) -> None:
        entity = self.tracker._mlflow.entities
        self.tracker.client.log_batch(self.id, params=[entity.Param(k, str(v)[:500]) for k, v in params.items() if v is not None])

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Metrics with one value each; one that the run has already, from before its process was killed, stays."""
        known = self.tracker.client.get_run(self.id).data.metrics
        self.series({k: [v] for k, v in metrics.items() if k not in known})

    def series(self, series: Mapping[str, Sequence[float]], *, first_step: int = 0, every: int = 1) -> None:
        """Metrics by step. Their times follow from the run's start, so that a run that is taken up again logs no point twice."""
        entity = self.tracker._mlflow.entities
        points = [
            entity.Metric(k, float(v), self.start_ms + first_step + i, first_step + i * every)
            for k, values in series.items()
            for i, v in enumerate(values)
        ]
        for i in range(0, len(points), 1000):
            self.tracker.client.log_batch(self.id, metrics=points[i : i + 1000])

    def dataset(self, rows: Sequence[Mapping[str, Any]], name: str, context: str, source: str) -> tuple[str, str]:
        """A dataset input; its name and digest. Runs that are to be compared share the name of their evaluation set."""
        import pandas
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.pandas_dataset import from_pandas
        from mlflow.entities import DatasetInput, InputTag

        data = from_pandas(pandas.DataFrame(rows), source=CodeDatasetSource({"mlflow.source.name": source}), name=name)
        tag = InputTag("mlflow.data.context", context)
        self.tracker.client.log_inputs(self.id, [DatasetInput(data._to_mlflow_entity(), [tag])])
        return data.name, data.digest

    def table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table, as the UI's table view reads it. MLflow's own log_table would append to what a killed process had written."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.text(json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False), file)
        known = json.loads(self.tracker.client.get_run(self.id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in known:
            self.tag(TABLES_TAG, json.dumps([*known, entry]))

    def figure(self, figure: Any, file: str) -> None:
        self.tracker.client.log_figure(self.id, figure, file)

    def text(self, text: str, file: str) -> None:
        self.tracker.client.log_text(self.id, text, file)

    def tag(self, key: str, value: str) -> None:
        self.tracker.client.set_tag(self.id, key, value)

    def rename(self, name: str, colour: str) -> None:
        """Name and colour in lists and charts, once there is a version to tell it by."""
        self.tracker.client.update_run(self.id, name=name)
        self.tag("mlflow.runColor", colour)
