"""The dashboard over HTTP: a page and what it is made of, on threads of the control process. It changes nothing.

Bound to loopback it answers only who asks for loopback by name: another site's page can't read it through DNS.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services import dashboard_page, metrics
from services.monitor import Monitor, Seen
from services.settings import ROOT, Settings

log = structlog.get_logger()
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def start(settings: Settings, use_case_name: str, counted: metrics.StepMetrics) -> None:
    """Watch and serve until the process ends; without the port there is no page, and the steps go on."""
    host, port = settings.dashboard_host, settings.dashboard_port
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        log.warning("no dashboard", host=host, port=port, reason=error.strerror)
        return
    monitor = Monitor(settings, use_case_name, metrics.MonitorMetrics(counted.registry))
    threading.Thread(target=monitor.run, name="monitor", daemon=True).start()
    app = create_app(monitor, allowed_hosts(host))
    threading.Thread(target=_serve, args=(app, listening), name="dashboard", daemon=True).start()
    log.info("dashboard", url=settings.dashboard_url)


def allowed_hosts(host: str) -> list[str]:
    """Names by which a page bound to `host` may be asked for."""
    if host == "localhost" or ipaddress.ip_address(host).is_loopback:
        return ["localhost", "127.0.0.1", host]
    return ["*"]


def create_app(monitor: Monitor, hosts: list[str]) -> Starlette:
    """The dashboard's HTTP application."""
    name, script = monitor.use_case.name, (ROOT / "services/static/dashboard.js").read_bytes()

    def seen(make: Callable[[Seen], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            look = monitor.watched()
            body = {"error": {"message": "the first look is under way"}} if look is None else make(look)
            return _json(body, 503 if look is None else 200)

        return answer

    async def page(request: Request) -> Response:
        return _text(dashboard_page.page(name, monitor.watched()), "text/html")

    async def sections(request: Request) -> Response:
        return _json(dashboard_page.sections(monitor.watched()))

    async def show_metrics(request: Request) -> Response:
        return Response(monitor.metrics.text(), media_type=metrics.MEDIA_TYPE)

    async def healthz(request: Request) -> Response:
        return _json({"ok": True})

    async def style(request: Request) -> Response:
        return _text(dashboard_page.style(), "text/css")

    async def code(request: Request) -> Response:
        return _text(script, "text/javascript")

    live = ("at", "rates", "broken", "runs")
    routes = {
        "/": page,
        "/sections": sections,
        "/api/status": seen(lambda look: look.status),
        "/api/quality": seen(lambda look: {"days": look.days, "versions": look.versions}),
        "/api/live": seen(lambda look: {key: asdict(look)[key] for key in live}),
        "/healthz": healthz,
        "/metrics": show_metrics,
        "/style.css": style,
        "/dashboard.js": code,
    }
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return Starlette(routes=[Route(path, answer) for path, answer in routes.items()], middleware=[guard])


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, SECURITY, "application/json")


def _text(body: str | bytes, media_type: str) -> Response:
    return Response(body, 200, SECURITY, media_type)


def _serve(app: Starlette, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, ws="none", lifespan="off", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])
