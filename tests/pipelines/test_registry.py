"""Against a real MLflow server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.errors import InputError, UnavailableError
from pipelines.registry import Registry

DEADLINE_S = 120.0
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    place = ["--backend-store-uri", f"sqlite:///{home}/db", "--artifacts-destination", str(home / "artifacts")]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
        "--serve-artifacts",
        *place,
    ]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=home)
        try:
            wait_until_healthy(url, process, home / "log")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"MLflow did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\x00graph" * 1000)
    (folder / "inputs.json").write_text(json.dumps({"numbers": ["x"]}))
    return folder


@pytest.mark.integration
def test_versions_come_back_with_files_metrics_and_tags(server: str, files: Path, tmp_path: Path) -> None:
    registry = Registry(server)
    assert registry.versions("shop") == []
    assert registry.register("shop", files, {"log_loss": 0.5, "auc": 0.7}, {"cut": "7", "warm_start": ""}) == "1"
    assert registry.register("shop", files, {"log_loss": 0.4}, {"cut": "8", "warm_start": "1"}) == "2"
    first, second = registry.versions("shop")
    assert first.metrics == {"log_loss": 0.5, "auc": 0.7} and first.tags["cut"] == "7"
    assert second.version == "2" and second.tags["warm_start"] == "1"
    folder = registry.download("shop", "2", tmp_path / "cache")
    assert folder == tmp_path / "cache/2"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in files.iterdir()}
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["2"]
    registry.tag("shop", "2", "sentence", "better")
    registry.set_alias("shop", "champion", "2")
    assert registry.versions("shop")[1].tags["sentence"] == "better"


@pytest.mark.integration
def test_a_cached_version_needs_no_server(server: str, files: Path, tmp_path: Path) -> None:
    Registry(server).register("kept", files, {}, {"cut": "1"})
    folder = Registry(server).download("kept", "1", tmp_path)
    assert Registry(NOBODY).download("kept", "1", tmp_path) == folder


@pytest.mark.integration
def test_a_deleted_version_leaves_no_files(server: str, files: Path, tmp_path: Path) -> None:
    registry = Registry(server)
    began = time.time() * 1000
    for cut in "12":
        registry.register("gone", files, {}, {"cut": cut})
    assert all(began - 1000 <= v.created <= time.time() * 1000 + 1000 for v in registry.versions("gone"))
    registry.delete("gone", "1")
    assert [v.version for v in registry.versions("gone")] == ["2"]
    assert registry.download("gone", "2", tmp_path).exists()
    with pytest.raises(InputError):
        registry.download("gone", "1", tmp_path)


@pytest.mark.integration
def test_an_unknown_version_is_one_line(server: str, files: Path, tmp_path: Path) -> None:
    Registry(server).register("known", files, {}, {"cut": "1"})
    with pytest.raises(InputError, match="99") as caught:
        Registry(server).download("known", "99", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob(".*")) == []


def test_an_absent_mlflow_is_told_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 "):
        Registry(NOBODY).versions("shop")
    assert time.monotonic() - started < 30


def test_settings_for_retrains_are_kept_with_the_model(server: str) -> None:
    registry = Registry(server)
    assert registry.settings("tuned") == ""
    for text in ("rate=0.001", "rate=0.002,hidden=16x8"):
        registry.set_settings("tuned", text)
        assert registry.settings("tuned") == text and registry.versions("tuned") == []
