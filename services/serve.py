"""`penstock serve`: the predictor's processes."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

import structlog

from features.errors import ConfigError
from features.usecase import UseCase, load
from services.predict_app import create_app
from services.predict_workers import Siblings, run_workers
from services.serving_state import ModelSlot, Prior, Serving, follow
from services.settings import Settings
from services.spool import Shipper, Spool

log = structlog.get_logger()
STORE_TIMEOUT_S = 0.3
STARTUP_S = 20.0
DRAIN_S = 5.0
SWITCH_S = 0.0005  # a reply waits so long for the threads that ship and follow, each time it lets go of the lock


def serve(settings: Settings, use_case_name: str, port: int = 0) -> None:
    """Run the predictor until it is told to stop: SIGTERM ends requests in progress, then ships the spool.

    Raises
    ------
    ConfigError : the port is taken, or beyond loopback it has no token
    """
    use_case, port, count = load(use_case_name), port or settings.predictor_port, settings.predictor_workers
    _check(settings)
    listening = _listen(settings.predictor_host, port)
    if count == 1:
        _serve(settings, use_case, port, [listening], 0)
        return
    private = [_listen("127.0.0.1", 0) for _ in range(count)]
    siblings = Siblings([s.getsockname()[1] for s in private])
    run_workers(lambda i: _serve(settings, use_case, port, [listening, private[i]], i, siblings), count)


def _check(settings: Settings) -> None:
    if settings.predictor_workers < 1:
        raise ConfigError(f"setting predictor_workers: expected 1 or more, got {settings.predictor_workers}")
    if settings.spool_when_full not in ("refuse", "drop"):
        raise ConfigError(f"setting spool_when_full: expected refuse or drop, got {settings.spool_when_full!r}")
    if not settings.predictor_token and not _is_loopback(settings.predictor_host):
        raise ConfigError(
            f"{settings.predictor_host} is reached from elsewhere, and what /predict logs is trained on: set "
            "predictor_token, or predictor_host to 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(
    settings: Settings,
    use_case: UseCase,
    port: int,
    sockets: list[socket.socket],
    worker: int,
    siblings: Siblings | None = None,
) -> None:
    """One process; the first one ships what processes that are no more have left, too."""
    from pipelines.feature_store import FeatureStore, repo_config
    from services import wiring

    broker, slot = wiring.broker(settings), ModelSlot(Serving(Prior(use_case.prior)))
    folders = _spool_folders(settings.home / "spool" / use_case.name, port, worker, settings.predictor_workers)
    spools = [Spool(folder, settings.spool_max_mb << 20) for folder in folders]
    shippers = [Shipper(spool, use_case.topic("predictions"), broker.producer).start() for spool in spools]
    state = follow(settings, use_case, broker, slot)
    store = FeatureStore(use_case, repo_config(settings.redis), timeout_s=STORE_TIMEOUT_S)
    try:
        if not state.wait_caught_up(STARTUP_S):
            log.warning("starting with the prior", reason=state.report().get("problem"))
        app = create_app(
            use_case,
            store,
            spools[0],
            slot,
            settings,
            readiness=state.report,
            unserved=lambda: state.unserved,
            siblings=siblings,
        )
        _run(app, sockets)
    finally:
        state.stop()
        for spool, shipper in zip(spools, shippers, strict=True):
            if not shipper.stop(DRAIN_S):
                log.warning("records wait in the spool for the next start", waiting_bytes=spool.waiting_bytes)
        store.close()


def _spool_folders(parent: Path, port: int, worker: int, workers: int) -> list[Path]:
    """A worker's own folder first."""
    if worker:
        return [parent / f"{port}.{worker}"]
    left = (p for p in parent.glob(f"{port}.*") if int(p.suffix[1:]) >= workers)
    return [parent / str(port), *left]


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} can't be listened on: {getattr(error, 'strerror', None) or error}") from None


def _run(app: Any, sockets: list[socket.socket]) -> None:
    import uvicorn

    sys.setswitchinterval(SWITCH_S)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    uvicorn.Server(config).run(sockets=sockets)
