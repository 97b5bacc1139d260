"""A LitServe server over a version's graph, run with the interpreter of `serving.lock`."""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Graph(litserve.LitAPI):
    """The tensors of a request through the graph, one thread."""

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def predict(self, request: dict[str, Any]) -> list[float]:
        given = request["inputs"]
        feed = {"numbers": np.array(given["numbers"], np.float32), "ids": np.array(given["ids"], np.int64)}
        return list(self.session.run(["score"], feed)[0].tolist())

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"predictions": output}


if __name__ == "__main__":
    server = litserve.LitServer(Graph(api_path="/invocations"), accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[2]), generate_client_file=False, access_log=False)
