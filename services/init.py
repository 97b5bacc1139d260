"""`python -m services.init [USE_CASE...]`: what must be there once before the processes of a stack of containers start.

The embedded stack's own jobs: databases, Airflow's tables and pool, Feast's registry, topics.
"""

from __future__ import annotations

import subprocess
import sys

from features.errors import PenstockError, UnavailableError
from services import embedded
from services.settings import Settings


def init(settings: Settings, use_cases: list[str]) -> None:
    """Run every job that the embedded stack runs once; those that were done are done again or skipped."""
    embedded.create_databases(settings)
    (settings.home / "airflow").mkdir(parents=True, exist_ok=True)
    jobs = [*embedded.airflow_services(settings, use_cases), embedded.feast_apply(settings)]
    jobs += [service for name in use_cases for service in embedded.own_services(settings, name)]
    for job in (job for job in jobs if job.once):
        print(f"init: {job.name}", flush=True)
        if job.prepare:
            job.prepare()
        if subprocess.run(job.command, env=dict(job.env), cwd=job.cwd, check=False).returncode:
            raise UnavailableError(f"{job.name} failed: the lines above say why")
        if job.after:
            job.after()


if __name__ == "__main__":
    try:
        init(Settings.load(), sys.argv[1:] or ["flights"])
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
