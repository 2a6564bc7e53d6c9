# make demo: environment, installation and the embedded demo.  make test: the tests.  make check: lint, types, layers.
# make docs: the site, in site/, with the tutorials run; a broken link is an error.
# make wheel: build the wheel, and use it in an environment of its own, away from this folder.
# make test-lowest: what needs the libraries' own interfaces, with the lowest versions that pyproject.toml allows.
# make milvus: the tests that need a Milvus server; it is installed in an environment of its own (Linux, x86-64).
# make gpu: what only a GPU shows, tests and benchmarks; ST_KDMCSE_DATA is the folder of wiki/wiki_sentences.txt,
# flickr8k_features, flickr30k and senteval. For search, install FAISS's wheel for GPUs in the place of the other.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DATA = $(or $(ST_KDMCSE_DATA),$(error set ST_KDMCSE_DATA to the folder of the data))
REAL_DATA = --text $(DATA)/wiki/wiki_sentences.txt --features $(DATA)/flickr8k_features --eval-data $(DATA)/senteval

# One process a core; two to four gain, each takes up to 2 GiB.
PYTEST = -m pytest -n logical --maxprocesses 4 --dist worksteal

LOWEST ?= .venv-lowest
MILVUS ?= .venv-milvus
# Not the server, Milvus, the commands and the demo: they stand on these.
CORE = tests/losses tests/training tests/data tests/teachers tests/extraction tests/evaluation \
	$(wildcard tests/test_[cefpu]*.py)

.PHONY: demo test test-lowest milvus wheel check docs bench gpu clean

demo: $(VENV)/.demo
	$(BIN)/st-kdmcse demo

test: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m "not milvus_server"

milvus: $(VENV)/.dev $(MILVUS)/.server
	ST_KDMCSE_MILVUS_SERVER=$(abspath $(MILVUS))/bin/milvus-server $(BIN)/python -m pytest -m milvus_server tests/search

test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python $(PYTEST) $(CORE)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS="ignore:IProgress not found" PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build

wheel:
	PYTHON=$(PYTHON) .ci/wheel

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/training_step.py

gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/training_run.py $(REAL_DATA) --output benchmarks/results/training_run_gpu.json
	$(BIN)/python benchmarks/training_curves.py $(REAL_DATA) --output benchmarks/results/training_curves_gpu.json
	$(BIN)/python benchmarks/search.py --captions $(DATA)/flickr30k/results_20130124.token \
		--sentences $(DATA)/wiki/wiki_sentences.txt --rows 1000000 --seeds 2 \
		--factories auto,Flat,IVF4096:Flat,IVF4096:SQ8,IVF4096:PQ48np --output benchmarks/results/search_gpu.json

clean:
	rm -rf $(VENV) $(LOWEST) $(MILVUS) kdmcse-demo site .cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.demo

$(LOWEST)/.dev: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[dev]" \
		$$(sed -n 's/^ *"\(transformers\)>=\([0-9.]*\),.*/\1==\2/p' pyproject.toml)  # else uv takes the newest
	touch $@

$(MILVUS)/.server:
	$(PYTHON) -m venv $(MILVUS)
	$(MILVUS)/bin/python -m pip install "milvus>=2.3.5,<2.4"
	touch $@
