# syntax=docker/dockerfile:1
# The environment, with compilers for Horovod's wheel; then the image that runs, which has none.
FROM python:3.11-slim-bookworm AS environment
WORKDIR /penstock
COPY requirements.lock ./
COPY services/__init__.py services/
COPY services/setup services/setup
RUN --mount=type=cache,target=/root/.cache/penstock python3 -m services.setup.install environment horovod

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 penstock && install -d -o penstock -g penstock /var/lib/penstock
WORKDIR /penstock
COPY --from=environment /penstock/.venv .venv
COPY . .
# numba takes machine code for its source by the second it was written, which layers keep, and compiles anew on another
# processor: for that the caches are the user's.
RUN --mount=type=cache,target=/root/.cache/penstock touch -d @0 features/*.py pipelines/*.py \
 && python3 -m services.setup.install project kernels && chown -R penstock features/__pycache__ pipelines/__pycache__
ENV PATH=/penstock/.venv/bin:$PATH HOME=/var/lib/penstock PENSTOCK_HOME=/var/lib/penstock PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib MLFLOW_DISABLE_TELEMETRY=true FEAST_USAGE=False DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1
USER penstock
CMD ["penstock", "--help"]
