"""The dashboard in a real browser, on a real stack: what it shows is the status, what is killed is named and heals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services import stack
from services.airflow_env import child_env
from services.settings import ROOT, Settings
from tests import chromium
from tests.conftest import free_ports

STEPS = "featurizer+joiner-flights"
NAMED = "document.querySelector('#broken').textContent"
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3]) return c } };
  return Math.min(...[...document.querySelectorAll('h1,h2,p,td,th,b,span,li,summary')].filter((e) => e.offsetParent)
    .map((e) => { const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }));
})()"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    if chromium.BINARY is None:
        pytest.skip("no Chromium here: install it (Debian: chromium) to see the dashboard in a browser")
    env = {"PENSTOCK_HOME": str(tmp_path_factory.mktemp("home")), "PENSTOCK_PORT_BASE": str(free_ports())}
    only = [STEPS, "predictor-flights", "control-flights"]
    with stack.running(Settings.load(env), ["flights"], only=only) as settings:
        yield settings


@pytest.fixture
def page(running: Settings, tmp_path: Path) -> Iterator[chromium.Page]:
    with chromium.page(tmp_path / "profile") as tab:
        yield tab


def command(settings: Settings) -> dict[str, Any]:
    words = [sys.executable, "-m", "services.cli", "status", "--json"]
    done = subprocess.run(words, cwd=ROOT, env=child_env(settings), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.integration
def test_what_the_page_shows_is_the_status_and_a_killed_step_is_named_until_it_is_back(
    running: Settings, page: chromium.Page
) -> None:
    page.open(running.dashboard_url)
    page.until(f"{NAMED} === 'Nothing is broken.'", "a whole stack")
    told = command(running)
    assert page.run("fetch('api/status').then((r) => r.json())") == told
    for i, (name, step) in enumerate(told["steps"].items(), 2):
        row = page.run(f"[...document.querySelectorAll('#flow tr:nth-child({i}) td')].map((e) => e.textContent)")
        assert [row[0], row[1], row[3], row[4]] == [name, *(f"{step[n]:,}" for n in ("members", "position", "lag"))]
    os.kill(told["services"][STEPS]["pid"], signal.SIGKILL)
    page.until(f"/{STEPS.replace('+', '.')}: .*, since [-\\d]+ [:\\d]+ UTC/.test({NAMED})", "the killed steps")
    page.until(f"{NAMED} === 'Nothing is broken.'", "their return", 90)
    assert page.errors == [] and all(url.startswith((running.dashboard_url, "data:")) for url in page.requests)


@pytest.mark.integration
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scroll_and_text_stands_out(
    running: Settings, page: chromium.Page, dark: bool
) -> None:
    page.open(running.dashboard_url, width=360, height=740, dark=dark)
    page.until("document.querySelector('#flow table') !== null", "the first look")
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run(CONTRAST) >= 4.5
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background != "rgb(255, 255, 255)") is dark
    assert page.run("document.querySelectorAll('.scroll:not([tabindex]), .scroll:not([aria-label])').length") == 0
