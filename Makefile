PENSTOCK := .venv/bin/penstock
BIN := .venv/bin
export PYTHONPATH :=
# ONNX Runtime and matplotlib write to the home folder unless they are told otherwise.
export ORT_DISABLE_TELEMETRY := 1
export MPLCONFIGDIR := $(CURDIR)/build/matplotlib

.PHONY: setup lock demo test test-stack soak secrets clean

setup: ## the environment, Kafka's jars and Horovod
	@python3 -m services.setup.install

IN := requirements.in
lock: setup ## requirements.lock from requirements.in; a peer's: make lock IN=benchmarks/quixstreams.in
	@python3 -c 'from services.setup import install; import subprocess, sys; sys.exit(subprocess.call([*install._uv(), *sys.argv[1:]]))' \
		pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url \
		$(IN) -o $(basename $(IN)).lock

demo: setup ## set-up, then the whole loop on real flights, ending with a report
	@$(PENSTOCK) demo $(ARGS)

test: setup ## style, types, and every test but the soak
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q -m "not soak and not stack" $(ARGS)

test-stack: setup ## the containers, on the engine of DOCKER_HOST or the one that the script PENSTOCK_TEST_ENGINE starts
	@$(BIN)/pytest -q -s -m stack $(ARGS)

soak: setup ## the long fault runs
	@$(BIN)/pytest -q -m soak $(ARGS)

secrets: ## .env, for docker compose; one that is there stays
	@test -e .env || python3 -m services.settings

clean: ## stop the embedded stack and remove its state; caches and .venv stay
	@if [ -x $(PENSTOCK) ]; then $(PENSTOCK) down; fi
	@rm -rf .penstock build .mypy_cache .ruff_cache
