"""The load generator counts what it gets, and the bench's first figures are the worst of their kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.serving import Client, ratios


class Handler(BaseHTTPRequestHandler):
    """Answers with the body; to /bad with 500; on /gone it closes the connection."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/gone":
            self.close_connection = True
            return
        self.send_response(500 if self.path == "/bad" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_answer_of_any_size_is_counted(port: int, tmp_path: Path) -> None:
    client = Client(tmp_path)
    for size in (10, 200_000):
        figures = client.load(port, 3, 0.3, client.request("/echo", "x" * size))
        assert figures["requests"] > 0 and figures["failed"] == 0
        assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]


def test_a_rate_is_kept(port: int, tmp_path: Path) -> None:
    client = Client(tmp_path)
    assert client.load(port, 4, 1, client.request("/echo", {}), rate=50)["requests"] == 50


@pytest.mark.parametrize("path", ["/bad", "/gone"])
def test_what_is_no_200_has_failed(port: int, tmp_path: Path, path: str) -> None:
    client = Client(tmp_path)
    figures = client.load(port, 2, 0.3, client.request(path, {}))
    assert figures["failed"] > 0 and figures["failed"] >= figures["requests"]


def test_the_first_figures_are_the_worst() -> None:
    half = {"half": {"p95_ms": 3.0}}
    own = {"1x1": {"per_s": 400.0}, "64x1": {"per_s": 900.0}} | half
    found = {
        "model_only": {
            "penstock": own,
            "echo": {"half": {"p95_ms": 1.5}},
            "mlflow": {"1x1": {"per_s": 40.0}, "64x1": {"per_s": 30.0}},
        },
        "features": {
            "penstock": {"1": {"per_s": 300.0}},
            "feast": {"1": {"per_s": 100.0}},
            "at_100_per_s": {"p95_ms": 7.0},
        },
        "swaps": {"p99_ratio": 1.5},
    }
    assert ratios(found) == {
        "mlflow_throughput_ratio": 10.0,
        "mlflow_throughput_ratio_by_load": {"1x1": 10.0, "64x1": 30.0},
        "echo_p95_ratio": 2.0,
        "p95_with_features_ms": 7.0,
        "feast_read_ratio": 3.0,
        "swap_p99_ratio": 1.5,
    }
