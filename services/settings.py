"""Settings: `penstock.toml`, each key overridable by `PENSTOCK_<KEY>`; secrets from the environment or a file."""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from features.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SECRETS = ("postgres_password", "redis_password", "airflow_password", "airflow_jwt", "airflow_secret", "airflow_fernet")


@dataclass(frozen=True)
class Settings:
    """Where everything is. With the defaults one dial, `port_base`, places the whole embedded stack on loopback.

    home : state of the embedded stack, secrets, logs, spool
    kafka_bootstrap, redis, postgres, mlflow_url, airflow_url, predictor_url : empty means the embedded one
    kafka_security, kafka_username, kafka_password, kafka_cafile : for a broker with SASL or TLS
    state_url : where snapshots and Parquet files live (fsspec: a path or s3://...)
    offline_keep_days : of the offline rows, those needed to answer for so many days back; 0 keeps all
    refresh_every_s : event time between two refreshes of the champion
    register_every_s : how often the champion's newest refresh becomes a version of the registry
    rollout_policy : immediate (a version's evaluation decides), standard or cautious (shadow, canary, champion)
    registry_keep_days : how long versions stay that never served
    train_compression : what Horovod's ranks send each other: none, fp16 or powersgd:RANK
    predictor_token : what callers of `/predict` send as `authorization: Bearer`; needed to listen beyond loopback
    predictor_workers : processes that answer on one port
    predictor_deadline_ms : a request that waits longer is answered 503; a caller's x-deadline-ms may say less
    spool_when_full : refuse (503) or drop (answer, but keep no record) what Kafka has not made room for
    metrics_host, metrics_port : where `penstock run` serves its Prometheus metrics; 0: nowhere
    dashboard_host, dashboard_port : where the control process serves its page
    allow_event_time : the predictor accepts `event_time` in a request (a replay needs it)
    """

    home: Path = Path(".penstock")
    port_base: int = 19090
    kafka_bootstrap: str = ""
    kafka_security: str = "PLAINTEXT"
    kafka_username: str = ""
    kafka_password: str = ""
    kafka_cafile: str = ""
    redis: str = ""
    postgres: str = ""
    mlflow_url: str = ""
    airflow_url: str = ""
    predictor_host: str = "127.0.0.1"
    predictor_port: int = 0
    predictor_token: str = ""
    predictor_workers: int = 1
    predictor_deadline_ms: int = 5000
    state_url: str = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = 0
    offline_keep_days: int = 0
    train_compression: str = "none"
    allow_event_time: bool = False
    commit_interval_s: float = 0.5
    idle_timeout_s: float = 0.05
    refresh_every_s: float = 3.0
    register_every_s: float = 900.0
    rollout_policy: str = "immediate"
    registry_keep_days: float = 1.0
    spool_max_mb: int = 1024
    spool_when_full: str = "refuse"

    @classmethod
    def load(cls, env: Mapping[str, str] = os.environ, file: Path | None = None) -> Settings:
        """Defaults < penstock.toml < environment; raises ConfigError naming the setting that is wrong."""
        path = file or Path(env.get("PENSTOCK_CONFIG", "penstock.toml"))
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text()) if path.exists() else {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"{path}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        values |= {n: env[f"PENSTOCK_{n.upper()}"] for n in known if f"PENSTOCK_{n.upper()}" in env}
        typed = {n: _convert(n, known[n].default, v) for n, v in values.items()}
        settings = cls(**typed)
        return replace(settings, home=settings.home.expanduser().absolute())._derived()

    def _derived(self) -> Settings:
        port, secret = self.port, self.secrets
        pg, rd = secret.get("postgres_password", ""), secret.get("redis_password", "")
        return replace(
            self,
            kafka_bootstrap=self.kafka_bootstrap or f"127.0.0.1:{port('kafka')}",
            redis=self.redis or f"127.0.0.1:{port('redis')},password={rd}",
            postgres=self.postgres or f"postgresql+psycopg://penstock:{pg}@127.0.0.1:{port('postgres')}",
            mlflow_url=self.mlflow_url or f"http://127.0.0.1:{port('mlflow')}",
            airflow_url=self.airflow_url or f"http://127.0.0.1:{port('airflow')}",
            predictor_port=self.predictor_port or port("predictor"),
            dashboard_port=self.dashboard_port or port("dashboard"),
            state_url=self.state_url or str(self.home / "state"),
        )

    def port(self, service: str) -> int:
        """The embedded stack's port of a service."""
        return self.port_base + PORTS.index(service)

    def listens(self, service: str) -> int:
        """Where it does: the embedded port, or what a setting of its own says."""
        return int(getattr(self, f"{service}_port", 0)) or self.port(service)

    @property
    def predictor_url(self) -> str:
        return f"http://{self.predictor_host}:{self.predictor_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.dashboard_host}:{self.dashboard_port}"

    @property
    def _secrets_file(self) -> Path:
        return self.home / "secrets.json"

    @property
    def secrets(self) -> dict[str, str]:
        """The stack's passwords and keys: PENSTOCK_<NAME> of the environment, else what `make_secrets` made."""
        made = dict(json.loads(self._secrets_file.read_text())) if self._secrets_file.exists() else {}
        given = {name: os.environ.get(f"PENSTOCK_{name.upper()}") for name in SECRETS}
        return made | {name: value for name, value in given.items() if value}

    def make_secrets(self) -> Settings:
        """Generate what is missing, readable by the owner alone; returns the settings that use it."""
        have = self.secrets
        made = {name: have.get(name) or secrets.token_urlsafe(32) for name in SECRETS}
        if made != have:
            self.home.mkdir(parents=True, exist_ok=True)
            _write_private(self._secrets_file, json.dumps(made, indent=1))
        return Settings.load()


PORTS = (
    *("kafka", "kafka_controller", "postgres", "redis", "mlflow", "airflow", "predictor", "airflow_log"),
    *("dashboard", "featurizer_metrics", "learner_metrics", "control_metrics"),
)


def write_env(file: Path) -> None:
    """The secrets that docker-compose.yml reads from `.env`: the embedded stack's, and the predictor's token."""
    made = Settings.load().make_secrets().secrets | {"predictor_token": secrets.token_urlsafe(32)}
    _write_private(file, "".join(f"PENSTOCK_{name.upper()}={value}\n" for name, value in made.items()))


def _write_private(path: Path, text: str) -> None:
    """Write a file, whole or not at all, that its owner alone can read."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.rename(path)


def _convert(name: str, default: Any, value: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is bool and not isinstance(value, bool):
            raise ValueError(value)
        return kind(value)
    except (KeyError, ValueError, TypeError):
        raise ConfigError(f"setting {name}: expected {kind.__name__}, got {value!r}") from None


if __name__ == "__main__":  # needs nothing but Python: a machine with containers has no environment of ours
    write_env(ROOT / ".env")
