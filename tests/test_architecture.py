"""Who may import whom: features <- pipelines <- services; one vendor behind one file; importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("features", "pipelines", "services", "dags", "benchmarks")
MAY_IMPORT = {
    "features": {"features"},
    "pipelines": {"features", "pipelines"},
    "services": {"features", "pipelines", "services", "benchmarks"},  # the command `bench` starts them
    "dags": set(),
    "benchmarks": {"features", "pipelines", "services", "benchmarks"},
}
HOME_OF = {  # vendor -> the files that may know it
    "kafka": {"pipelines/kafka.py"},
    "mlflow": {"pipelines/registry.py", "benchmarks/serving_peers.py"},
    "redis": {"pipelines/redis_store.py", "benchmarks/rig.py", "benchmarks/freshness.py"},
    "numba": {"features/kernel.py"},
    "sqlite3": {"pipelines/sqlite_store.py"},
    "duckdb": {"pipelines/offline_store.py"},
    "onnxruntime": {"pipelines/onnx_model.py", "benchmarks/serving_litserve.py"},
    "horovod": {"pipelines/training.py", "benchmarks/ranks.py"},
    "torch": {f"pipelines/{name}.py" for name in ("net", "training", "trees", "online", "refresher", "compression")}
    | {"benchmarks/ranks.py"},
    "sklearn": {"pipelines/trees.py", "pipelines/baselines.py", "services/audit.py"},
    "lightgbm": {"pipelines/baselines.py"},
    "optuna": {"pipelines/search.py"},
    "river": {"pipelines/baselines.py", "pipelines/drift.py"},
    "fastapi": set(),
    "prometheus_client": {"services/metrics.py", "services/predict_workers.py"},
    "starlette": {"services/predict_app.py", "services/dashboard.py", "benchmarks/serving_peers.py"},
    "confluent_kafka": set(),
}
FILES = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way_and_vendors_stay_home(path: Path) -> None:
    name, layer = str(path.relative_to(ROOT)), path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top = module.split(".")[0]
        if top in LAYERS:
            assert top in MAY_IMPORT[layer], f"{name} must not import {module}"
        assert name in HOME_OF.get(top, {name}), f"{name} must not import {module}: its home is {HOME_OF[top]}"


@pytest.mark.parametrize("heavy", ["feast", "torch", "mlflow", "kafka", "pandas", "numpy"])
def test_the_command_line_starts_without_heavy_imports(heavy: str) -> None:
    code = f"import sys, services.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_features_opens_nothing() -> None:
    """A use case can be imported without a network, an environment or a file of the stack."""
    code = "import socket, sys; socket.socket.connect = lambda *a: sys.exit(9); import features.flights"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, check=False).returncode == 0
