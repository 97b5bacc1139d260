"""`penstock bench serving`: the predictor beside other servers with the same model, on one core each, under one client.

Feature vectors go to MLflow's server, LitServe, a bare Starlette echo and the predictor alike; MLflow and LitServe get
them as tensors that are ready for the graph, the predictor by feature name. Features by key go to the predictor (which
scores and logs, too) and to `feast serve` (which reads alone) over the same rows in Redis.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import yaml

from benchmarks import peers
from benchmarks.learning import asked
from benchmarks.rig import CORE, apart, process, rig, say
from features.errors import UnavailableError
from features.flights import use_case
from features.usecase import ModelInputs
from features.vectors import Vectorizer, view_columns
from pipelines.broker import Message
from pipelines.feature_store import FeatureStore, repo_config
from pipelines.onnx_model import example_inputs
from pipelines.step import Rows
from services import stack, wiring
from services.airflow_env import child_env
from services.settings import Settings
from services.topics import create

HERE = Path(__file__).parent
CONNECTIONS, BATCHES = (1, 16, 64), (1, 100)
STARTS_S = 120.0
SWAPS, TURNS = 20, 5
SAMPLES = {"INT64": 3, "DOUBLE": 1.5, "STRING": "a", "INT64_LIST": [1, 2], "DOUBLE_LIST": [1.5, 2.5]}
Figures = dict[str, Any]


def bench(seconds: float = 2.0) -> Figures:
    """Each server in turn, `seconds` at each load."""
    with apart(), rig(use_case) as settings:
        home = settings.home
        client = Client(home)
        create(settings, use_case.name)
        for version in "12":
            run([sys.executable, "-m", "benchmarks.learning", str(home / "models" / use_case.name / version)], settings)
        fill(settings)
        folder, port = home / "models" / use_case.name / "1", settings.port("airflow")
        result = {"model_only": model_only(settings, client, folder, port, seconds)}
        result |= with_features(settings, client, port, seconds) | {"onnxruntime": onnxruntime_loop(settings, folder)}
    return ratios(result) | result


def model_only(settings: Settings, client: Client, folder: Path, port: int, seconds: float) -> Figures:
    """Requests a second and latencies of feature vectors, by server, connections and batch."""
    columns, vector, tensors = vectors(folder)
    named = {
        n: client.request("/invocations", {"dataframe_split": {"columns": columns, "data": [vector] * n}})
        for n in BATCHES
    }
    bare = {n: client.request("/invocations", {"inputs": {k: v * n for k, v in tensors.items()}}) for n in BATCHES}
    script = ["-m", "benchmarks.serving_peers"]
    mlflow = [sys.executable, *script, "mlflow", str(folder), str(settings.home / "mlflow"), str(port)]
    lit = [peers.python("serving"), str(HERE / "serving_litserve.py"), str(folder / "model.onnx"), str(port)]
    found: Figures = {}
    with predictor(settings) as own:
        found["penstock"] = matrix(client, own, named, seconds)
        half = found["penstock"]["16x1"]["per_s"] / 2
        found["penstock"]["half"] = client.load(own, 16, 2 * seconds, named[1], half)
    with server([sys.executable, *script, "echo", str(port)], settings, port, "/ping"):
        found["echo"] = matrix(client, port, named, seconds)
        found["echo"]["half"] = client.load(port, 16, 2 * seconds, named[1], half)
    with server(mlflow, settings, port, "/ping"):
        found["mlflow"] = matrix(client, port, bare, seconds)
    with server(lit, settings, port, "/health"):
        found["litserve"] = matrix(client, port, bare, seconds)
    return found


def matrix(client: Client, port: int, requests: Mapping[int, Path], seconds: float) -> Figures:
    """Every load: `connections x rows of a request`."""
    client.load(port, 4, 1, requests[1])  # warm
    return {f"{c}x{n}": client.load(port, c, seconds, requests[n]) for n in BATCHES for c in CONNECTIONS}


def with_features(settings: Settings, client: Client, port: int, seconds: float) -> Figures:
    """The predictor by keys, at rest, at saturation and while versions are swapped; Feast's server beside it."""
    row = asked(0, 0)
    by_keys = client.request("/predict", {"entities": row["entities"], "fields": row["fields"]})
    keys = Vectorizer(use_case).entity_keys(row["entities"], row["fields"])
    names = [f"{view.name}:{column.name}" for view in use_case.views for column in view_columns(view)]
    by_name = client.request("/get-online-features", {"features": names, "entities": {k: [v] for k, v in keys.items()}})
    with predictor(settings) as own:
        client.load(own, 4, 1, by_keys)
        found = {f"{c}": client.load(own, c, seconds, by_keys) for c in CONNECTIONS}
        calm = client.load(own, 16, 10, by_keys, 100)
        swaps = swapping(settings, lambda: client.load(own, 16, 4, by_keys, found["16"]["per_s"] / 4), own)
    feast = [sys.executable, "-m", "benchmarks.serving_peers", "feast", str(feast_repo(settings)), str(port)]
    with server(feast, settings, port, "/health"):
        client.load(port, 4, 1, by_name)
        read = {f"{c}": client.load(port, c, seconds, by_name) for c in CONNECTIONS}
    return {"features": {"penstock": found, "feast": read, "at_100_per_s": calm}, "swaps": swaps}


def swapping(settings: Settings, load: Callable[[], Figures], port: int) -> Figures:
    """The same load with and without swaps, in turns."""
    calm, swapped, failed, generation = [], [], 0, 1
    for _ in range(TURNS):
        calm.append(load()["p99_ms"])
        swaps = threading.Thread(target=swap, args=(settings, generation + 1))
        swaps.start()
        figures = load()
        swaps.join()
        generation += SWAPS
        swapped.append(figures["p99_ms"])
        failed += figures["failed"]
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").json()["generation"] == generation, "the swaps")
    ratio = median(s / c for s, c in zip(swapped, calm, strict=True))
    found = {"swaps": TURNS * SWAPS, "failed": failed, "p99_ratio": round(ratio, 2)}
    return found | {"p99_ms": median(swapped), "calm_p99_ms": median(calm)}


def swap(settings: Settings, generation: int, count: int = SWAPS) -> None:
    """Let versions 1 (in odd generations) and 2 serve in turns."""
    broker = wiring.broker(settings)
    producer = broker.producer()
    for number in range(generation, generation + count):
        state = {"generation": number, "roles": {"champion": "21"[number % 2]}}
        producer.send([Message(use_case.topic("models"), json.dumps(state).encode(), b"state")])
        producer.flush()
        time.sleep(0.1)
    producer.close()


def ratios(found: Figures) -> Figures:
    """The figures that one looks at first."""
    own, echo, mlflow = (found["model_only"][name] for name in ("penstock", "echo", "mlflow"))
    penstock, feast = found["features"]["penstock"], found["features"]["feast"]
    return {
        "mlflow_throughput_ratio": round(min(own[load]["per_s"] / mlflow[load]["per_s"] for load in mlflow), 2),
        "mlflow_throughput_ratio_by_load": {k: round(own[k]["per_s"] / mlflow[k]["per_s"], 2) for k in mlflow},
        "echo_p95_ratio": round(own["half"]["p95_ms"] / echo["half"]["p95_ms"], 2),
        "p95_with_features_ms": found["features"]["at_100_per_s"]["p95_ms"],
        "feast_read_ratio": round(min(penstock[c]["per_s"] / feast[c]["per_s"] for c in feast), 2),
        "swap_p99_ratio": found["swaps"]["p99_ratio"],
    }


class Client:
    """The load generator, compiled, and the requests that it sends."""

    def __init__(self, home: Path) -> None:
        self.home, self.program = home, home / "load"
        command = ["gcc", "-O2", "-o", str(self.program), str(HERE / "load.c")]
        if subprocess.run(command, check=False).returncode:
            raise UnavailableError("the load generator does not compile: install gcc")

    def request(self, path: str, body: Any) -> Path:
        """A file that holds a request as it goes over the wire."""
        data = json.dumps(body).encode()
        lines = f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(data)}"
        head = "\r\n".join(lines) + "\r\n\r\n"
        file = self.home / f"request-{len(list(self.home.glob('request-*')))}"
        file.write_bytes(head.encode() + data)
        return file

    def load(self, port: int, connections: int, seconds: float, request: Path, rate: float = 0) -> Figures:
        """One run; it has the cores that the server doesn't have."""
        command = [str(self.program), *map(str, (port, connections, seconds, rate, request))]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
        if done.returncode:
            raise UnavailableError(f"no load on port {port} with {request.name}; its message is above")
        return dict(json.loads(done.stdout))


def vectors(folder: Path) -> tuple[list[str], list[Any], dict[str, list[Any]]]:
    """A version's columns with one vector of them, and the same size of vector as the graph's tensors."""
    declared = ModelInputs.from_json(json.loads((folder / "inputs.json").read_bytes()))
    types, ids = Vectorizer(use_case).types, {c.name for c in declared.categories}
    vector = [("a" if types[n] in ("STRING", "str") else 3) if n in ids else 1.5 for n in declared.columns]
    one = example_inputs(declared, json.loads((folder / "example.json").read_bytes())).take(slice(1))
    return list(declared.columns), vector, {"numbers": [[1.5] * one.numbers.shape[1]], "ids": one.ids.tolist()}


@contextmanager
def predictor(settings: Settings) -> Iterator[int]:
    """The predictor, serving version 1."""
    port = settings.predictor_port
    swap(settings, 1, 1)
    with server([sys.executable, "-m", "services.cli", "serve", use_case.name], settings, port, "/readyz"):
        yield port


@contextmanager
def server(command: list[str], settings: Settings, port: int, path: str) -> Iterator[None]:
    """A server on a core of its own, once it answers."""
    with process(command, child_env(settings), CORE, stdout=subprocess.DEVNULL) as child:
        name = " ".join(command[1:4])

        def answers() -> bool:
            if child.poll() is not None:
                raise UnavailableError(f"{name} ended with code {child.returncode}; its messages are above")
            try:
                return httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
            except httpx.HTTPError:
                return False

        until(answers, name)
        say(f"{name} answers")
        try:
            yield
        finally:
            child.terminate()
            child.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # LitServe leaves its processes behind
    until(lambda: stack.is_free(port), f"port {port}")


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STARTS_S
    while not done():
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what}: not in {STARTS_S:.0f} s")
        time.sleep(0.1)


def run(command: list[str], settings: Settings) -> None:
    with process(command, child_env(settings)) as child:
        if child.wait():
            raise UnavailableError(f"{' '.join(command[1:])} failed; its messages are above")


def onnxruntime_loop(settings: Settings, folder: Path) -> Figures:
    """Runs a second of the graph alone, without a server, by batch."""
    command = [sys.executable, "-m", "benchmarks.serving_peers", "onnxruntime", str(folder)]
    with process(command, child_env(settings), CORE, stdout=subprocess.PIPE) as child:
        return dict(json.loads(child.communicate()[0].splitlines()[-1]))


def fill(settings: Settings) -> None:
    """A full row for every view under the keys that are asked for."""
    store, row = FeatureStore(use_case, repo_config(settings.redis)), asked(0, 0)
    keys, now = Vectorizer(use_case).entity_keys(row["entities"], row["fields"]), round(time.time() * 1000)
    views = store._views.values()
    store.write(
        [
            Rows(
                v.name,
                [[keys[k]] for k in v.keys],
                [now],
                {n: [SAMPLES[t]] for n, t in zip(v.columns, v.types, strict=True)},
            )
            for v in views
        ]
    )
    store.close()


def feast_repo(settings: Settings) -> Path:
    """A folder for Feast's own server: the same Redis, a registry in a file."""
    folder = settings.home / "feast"
    folder.mkdir()
    config = {
        "project": "penstock",
        "provider": "local",
        "registry": "registry.db",
        "entity_key_serialization_version": 3,
    }
    config |= {
        "online_store": {"type": "redis", "connection_string": settings.redis},
        "offline_store": {"type": "file"},
    }
    (folder / "feature_store.yaml").write_text(yaml.safe_dump(config))
    return folder
