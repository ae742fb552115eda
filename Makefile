# The usual tasks. `make demo` and `make test` work on a fresh machine with Python >= 3.10.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.lexiseg-installed
RAY    := $(VENV)/.lexiseg-ray
DOCS   := $(VENV)/.lexiseg-docs
CHROME := $(VENV)/.lexiseg-browser

DEMO_IMAGE   ?= lexiseg/samples/demo.png
DEMO_CLASSES ?= @lexiseg/samples/demo.txt
DEMO_OUT     ?= out/demo
PRETRAINED   := lexiseg/pretrained

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow fuzz test-browser lint docs weights results reproduce benchmark clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

install: $(STAMP) ## Build the environment in .venv

# The stamp is newer than pyproject.toml once an installation has finished, so an interrupted one is begun again.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Segment a sample picture with classes the model was trained on and classes it was not
	$(BIN)/lexiseg predict $(DEMO_IMAGE) $(DEMO_CLASSES) --model second-look-emoji -o $(DEMO_OUT)

test: $(STAMP) ## Run every test but the slow ones
	$(BIN)/python -m pytest

fuzz: $(STAMP) ## Try 20,000 mutated inputs, ten times what `make test` tries
	$(BIN)/python -m tests.fuzz --count 20000

# Ray and Jupyter are large and only these tests need them, so `make install` leaves them out.
$(RAY): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,ray,notebooks]'
	@touch $@

test-slow: $(STAMP) $(RAY) ## Run the slow tests as well, those on a local Ray cluster among them
	$(BIN)/python -m pytest -m 'not browser'

# Debian's Chromium; elsewhere install one and its driver by hand.
$(CHROME): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,browser]'
	command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }
	@touch $@

test-browser: $(CHROME) ## Drive the web page in a headless Chromium; screenshots go to build/screenshots
	$(BIN)/python -m pytest -m browser tests/browser

lint: $(STAMP) ## Check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,docs]'
	@touch $@

docs: $(DOCS) ## Build the pages and the Python reference into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Each is trained as its recipe says. DeOP starts from the proposals; second-look has ZegCLIP's training.
WEIGHTS := clip-emoji clip-world2 cat-seg-world2 zegclip-emoji cascade-clip-emoji second-look-emoji deop-emoji

weights: $(STAMP) ## Train the shipped weights again: the small CLIPs, then the systems on it (hours on two cores)
	$(BIN)/lexiseg train clip-emoji -o runs/clip-emoji --resume
	mkdir -p $(addprefix $(PRETRAINED)/,$(WEIGHTS))
	cp runs/clip-emoji/model/* $(PRETRAINED)/clip-emoji/
	$(BIN)/lexiseg train clip-world2 -o runs/clip-world2 --resume
	cp runs/clip-world2/model/* $(PRETRAINED)/clip-world2/
	$(BIN)/lexiseg train cat-seg-picture-world-2 -o runs/cat-seg-world2 --resume
	cp runs/cat-seg-world2/model/* $(PRETRAINED)/cat-seg-world2/
	$(BIN)/lexiseg evaluate picture-world-2 --weights cat-seg-world2 --split test -o runs/cat-seg-world2/test
	cp runs/cat-seg-world2/test/report.json $(PRETRAINED)/cat-seg-world2/
	$(BIN)/lexiseg train zegclip-picture-world -o runs/zegclip-emoji --resume
	cp runs/zegclip-emoji/model/* $(PRETRAINED)/zegclip-emoji/
	$(BIN)/lexiseg train cascade-clip-picture-world -o runs/cascade-clip-emoji --resume
	$(BIN)/lexiseg train second-look-picture-world --initial zegclip-emoji --set train.steps=0 \
		-o runs/second-look-emoji --resume
	$(BIN)/lexiseg train proposals-picture-world -o runs/proposals --resume
	$(BIN)/lexiseg train deop-picture-world --initial runs/proposals -o runs/deop --resume
	$(BIN)/lexiseg train deop-picture-world --initial runs/deop --set train.steps=0 \
		--set 'model.options.leftover={count: 8}' -o runs/deop-emoji --resume
	for name in cascade-clip-emoji second-look-emoji deop-emoji; do cp runs/$$name/model/* $(PRETRAINED)/$$name/; done

results: $(STAMP) ## Train and measure every system on picture-world again and write docs/results (hours)
	$(BIN)/python -m benchmarks.picture_world --runs runs/picture-world

# `python -m benchmarks.claims --list` names them.
reproduce: $(STAMP) ## One claim of a paper at a small size, in minutes: make reproduce CLAIM=nga
	$(BIN)/python -m benchmarks.claims $(CLAIM) --reproduce --runs runs/reproduce

benchmark: $(STAMP) ## Speed and memory, as tables
	$(BIN)/python -m benchmarks.predict
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.data --step
	$(BIN)/python -m benchmarks.evaluation

clean: ## Remove what the targets above wrote, but not the environment
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
