"""The servers beside which `penstock bench serving` measures, as processes: echo, MLflow's, Feast's; and no server."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def echo(port: str) -> None:
    """The least that a Starlette application does with a request."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        await request.body()
        return Response(b'{"predictions":[0.25]}', media_type="application/json")

    async def ping(request: Request) -> Response:
        return Response(b"\n")

    app = Starlette(routes=[Route("/invocations", answer, methods=["POST"]), Route("/ping", ping)])
    uvicorn.run(app, port=int(port), loop="uvloop", http="httptools", access_log=False, log_level="warning")


def mlflow(folder: str, to: str, port: str) -> None:
    """`mlflow models serve` with one worker and, as all have one core, one thread, over the version's graph as MLflow's
    ONNX flavour keeps it."""
    import numpy as np
    import onnx
    from mlflow.cli import cli
    from mlflow.models import ModelSignature
    from mlflow.onnx import save_model
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(f"{folder}/model.onnx")
    width = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in model.graph.input}
    kinds = {"numbers": np.float32, "ids": np.int64}
    inputs = Schema([TensorSpec(np.dtype(kinds[name]), (-1, size), name) for name, size in width.items()])
    threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    save_model(model, to, signature=ModelSignature(inputs), pip_requirements=[], onnx_session_options=threads)
    cli(["models", "serve", "-m", to, "-p", port, "--env-manager", "local", "--workers", "1"])


def feast(folder: str, port: str) -> None:
    """`feast serve` with one worker, over the use case's views."""
    from feast import FeatureStore
    from feast.cli.cli import cli

    from features import flights

    store = FeatureStore(folder)
    entities = {e.name: e for e in vars(flights).values() if type(e).__name__ == "Entity"}
    store.apply([*entities.values(), *flights.use_case.views])
    cli(["-c", folder, "serve", "-p", port, "--workers", "1", "--no-access-log"])


def onnxruntime(folder: str) -> None:
    """Runs a second of the graph, one thread, by batch."""
    from features.usecase import ModelInputs
    from pipelines.onnx_model import OnnxModel, example_inputs

    model, figures = OnnxModel.load(Path(folder), "1"), dict[str, Any]()
    declared = ModelInputs.from_json(json.loads(Path(folder, "inputs.json").read_bytes()))
    example = example_inputs(declared, json.loads(Path(folder, "example.json").read_bytes()))
    for n in (1, 100):
        inputs = example.take([i % len(example) for i in range(n)])  # type: ignore[arg-type]
        runs, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < 2:
            model.score(inputs)
            runs += 1
        figures[str(n)] = {"per_s": round(runs / took, 1)}
    print(json.dumps(figures))


if __name__ == "__main__":
    {f.__name__: f for f in (echo, mlflow, feast, onnxruntime)}[sys.argv[1]](*sys.argv[2:])
