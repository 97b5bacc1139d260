"""The model registry: versions with their files, metrics and tags, in MLflow.

A version is plain files (no MLflow flavour, nothing pickled) of one run in the experiment named after the model.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FILES = "model"  # where in a run's artifacts a version's files are
# An MLflow that does not answer is told in seconds, not in the minutes of its client's defaults.
PATIENCE = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # it would fill logs
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@dataclass(frozen=True)
class Version:
    """One registered version: its number, tags, the metrics of its run, and when it was made (epoch ms)."""

    version: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    created: int = 0


class Registry:
    """The registry at an MLflow tracking server's `url`. Every method raises UnavailableError when it is away."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            for name, value in PATIENCE.items():
                os.environ.setdefault(name, value)
            from mlflow.tracking import MlflowClient

            self._opened = MlflowClient(tracking_uri=self.url, registry_uri=self.url)
        return self._opened

    def register(self, name: str, folder: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """Upload the files of `folder` with metrics as a run, and make it the model's next version.

        Returns
        -------
        the version's number; a version without all of its files can't come about
        """
        from mlflow.entities import Metric, RunTag

        with self._answering():
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run = self._client.create_run(number, tags=dict(tags))
            logged = [Metric(key, value, run.info.start_time, 0) for key, value in metrics.items()]
            self._client.log_batch(run.info.run_id, metrics=logged, tags=[RunTag("model", name)])
            self._client.log_artifacts(run.info.run_id, str(folder), FILES)
            self._client.set_terminated(run.info.run_id)
            self._create_model(name)
            source = f"{run.info.artifact_uri}/{FILES}"
            made = self._client.create_model_version(name, source, run.info.run_id, tags=dict(tags))
        return str(made.version)

    def log_run(
        self,
        experiment: str,
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        folder: Path,
        artifacts: str | None = None,
    ) -> tuple[str, str]:
        """A finished run with parameters, metrics and the files of `folder`; a new experiment's files go to the URL
        `artifacts`, or where the server keeps them.

        Returns
        -------
        the numbers of its experiment and of the run
        """
        from mlflow.entities import Metric, Param

        with self._answering():
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment, artifacts)
            run = self._client.create_run(number)
            logged = [Metric(key, value, run.info.start_time, 0) for key, value in metrics.items()]
            given = [Param(key, value[:6000]) for key, value in params.items()]
            self._client.log_batch(run.info.run_id, metrics=logged, params=given)
            self._client.log_artifacts(run.info.run_id, str(folder))
            self._client.set_terminated(run.info.run_id)
        return str(number), str(run.info.run_id)

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first; none when there is no such model."""
        with self._answering():
            found = self._client.search_model_versions(f"name='{name}'", max_results=1000)
            runs = {v.run_id: v.run_id and self._client.get_run(v.run_id).data.metrics for v in found}
        listed = [
            Version(str(v.version), dict(v.tags), dict(runs[v.run_id] or {}), v.creation_timestamp or 0) for v in found
        ]
        return sorted(listed, key=lambda v: int(v.version))

    def download(self, name: str, version: str, to: Path) -> Path:
        """The folder `to`/`version` with the version's files; downloaded once, and complete when it exists."""
        folder = to / version
        if folder.exists():
            return folder
        to.mkdir(parents=True, exist_ok=True)
        temporary = to / f".{version}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            with self._answering():
                run = self._client.get_model_version(name, version).run_id
                path = Path(self._client.download_artifacts(str(run), FILES, str(temporary)))
            if not any(path.iterdir()):
                raise InputError(f"version {version} of {name} has no files in the registry")
            try:
                path.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary)
        return folder

    def delete(self, name: str, version: str) -> None:
        """Remove a version with its files and its run."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self._answering():
            run = self._client.get_run(str(self._client.get_model_version(name, version).run_id))
            files: Any = get_artifact_repository(run.info.artifact_uri, self.url)
            files.delete_artifacts(FILES)
            self._client.delete_model_version(name, version)
            self._client.delete_run(run.info.run_id)

    def settings(self, name: str) -> str:
        """What the last search found that was better, as `pipelines.learners` reads it; empty without one."""
        with self._answering():
            found = self._client.search_registered_models(f"name='{name}'")
        return str(found[0].tags.get("settings", "")) if found else ""

    def set_settings(self, name: str, settings: str) -> None:
        """Have later retrains use these settings."""
        with self._answering():
            self._create_model(name)
            self._client.set_registered_model_tag(name, "settings", settings)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias (champion, say) at a version."""
        with self._answering():
            self._client.set_registered_model_alias(name, alias, version)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version."""
        with self._answering():
            return {alias: str(v) for alias, v in self._client.get_registered_model(name).aliases.items()}

    def drop_alias(self, name: str, alias: str) -> None:
        """Remove an alias; one that is not there is no error."""
        with self._answering():
            self._client.delete_registered_model_alias(name, alias)

    def tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set one tag of a version."""
        with self._answering():
            self._client.set_model_version_tag(name, version, key, value)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """MLflow's errors as ours."""
        import requests
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise InputError(f"MLflow at {self.url}: {_line(error)}") from error
            raise UnavailableError(f"MLflow at {self.url} does not answer: {_line(error)}") from error
        except requests.RequestException as error:
            raise UnavailableError(f"MLflow at {self.url} does not answer: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
