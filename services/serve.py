"""`penstock serve`: the predictor's process."""

from __future__ import annotations

import socket
from typing import Any

import structlog

from features.errors import ConfigError
from features.usecase import load
from services.predict_app import create_app
from services.serving_state import ModelSlot, Prior, Serving, ServingState
from services.settings import Settings
from services.spool import Shipper, Spool

log = structlog.get_logger()
STORE_TIMEOUT_S = 0.3
STARTUP_S = 20.0
DRAIN_S = 5.0


def serve(settings: Settings, use_case_name: str, port: int = 0) -> None:
    """Run the predictor until it is told to stop: SIGTERM ends requests in progress, then ships the spool."""
    from pipelines.feature_store import FeatureStore, repo_config
    from services import wiring

    use_case, port = load(use_case_name), port or settings.predictor_port
    listening = _listen(settings.predictor_host, port)
    broker, slot = wiring.broker(settings), ModelSlot(Serving(Prior(use_case.prior)))
    spool = Spool(settings.home / "spool" / use_case.name / str(port), settings.spool_max_mb << 20)
    shipper = Shipper(spool, use_case.topic("predictions"), broker.producer).start()
    registry, models = wiring.registry(settings), settings.home / "models" / use_case.name
    state = ServingState(
        use_case,
        broker,
        slot,
        lambda version: registry.download(use_case.name, version, models),
        refreshes=settings.state_url,
    ).start()
    store = FeatureStore(use_case, repo_config(settings.redis), timeout_s=STORE_TIMEOUT_S)
    try:
        if not state.wait_caught_up(STARTUP_S):
            log.warning("starting with the prior", reason=state.report().get("problem"))
        app = create_app(
            use_case, store, spool, slot, settings, readiness=state.report, unserved=lambda: state.unserved
        )
        _run(app, [listening])
    finally:
        state.stop()
        if not shipper.stop(DRAIN_S):
            log.warning("records wait in the spool for the next start", waiting_bytes=spool.waiting_bytes)
        store.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} can't be listened on: {getattr(error, 'strerror', None) or error}") from None


def _run(app: Any, sockets: list[socket.socket]) -> None:
    import uvicorn

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
