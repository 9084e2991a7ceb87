# `make bench` and `make test` do all set-up on a machine with Python 3.11+, make and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_JSON ?= output/run.json
# The address of PyTorch's CPU wheel index, for a Linux machine without a GPU (see README).
TORCH_INDEX ?=
ARGS ?=

# The image and what runs in it. LOCAL=1 runs the same without an image.
IMAGE ?= peftbench
DOCKER ?= docker
LOCAL ?=
MODEL ?=
PEFT ?=
METHOD ?= sft
DATA ?=
export IMAGE DOCKER GPUS OUTPUT CACHE
RUN = $(if $(LOCAL),$(BIN)/python -m peftbench,scripts/image.sh)

.PHONY: help install bench test lint verify overhead calibration costs against-full sweep growth scale peers glossary clean \
        build train infer shell image-check
help:
	@echo "make build    the pinned image (docker): trains, benchmarks and chats"
	@echo "make train PEFT=lora MODEL=gpt-2 [METHOD=dpo] [DATA=wikitext-2]   train one case in the image"
	@echo "make infer PEFT=lora MODEL=gpt-2   talk to it;   make shell   a shell in the image"
	@echo "              LOCAL=1 does the same without docker; ARGS=\"...\" adds options"
	@echo "make image-check  build the image without an engine, and run smoke inside"
	@echo "make bench    the quick preset: 44 cases, a few minutes on a CPU -> $(RUN_JSON)"
	@echo "make test     all tests that need no GPU, and the linters (under 10 minutes)"
	@echo "make lint     ruff and mypy"
	@echo "make verify   the long proofs (an hour): three seeds, the real model; PARTS=\"a b\" picks some"
	@echo "make overhead what measuring itself costs: the sampler, and what a run spends outside its phases"
	@echo "make calibration  the comparison's promises on simulated nights (some minutes)"
	@echo "make costs    write the table of PPO's cost against DPO's and ORPO's into docs/ppo.md"
	@echo "make against-full  write the tables of adapters against full fine-tuning into docs/against-full.md"
	@echo "make growth   a step's cost by batch, length and model size (15 minutes) -> docs/growth.md"
	@echo "make scale    what a cluster's driver takes a round, and 10,000 cases on 1,000 GPUs -> docs/scaling.md"
	@echo "make sweep    learning rates of the adapters that have no tuned ones (25 minutes) -> results/sweeps"
	@echo "make peers    side by side with TRL 1.12 (PPO) and 1.16 (an hour) -> results/peers; PARTS=\"ppo\""
	@echo "make glossary write the METRICS table into both READMEs"

$(VENV)/.installed: requirements.lock pyproject.toml scripts/before_install.py
	@$(PYTHON) scripts/before_install.py "$(TORCH_INDEX)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(BIN)/python -m pip install --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.lock)"; fi
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/.installed

bench: install
	@mkdir -p $(dir $(RUN_JSON))
	$(BIN)/python -m pytest bench --benchmark-json=$(RUN_JSON) --benchmark-columns=median,rounds $(ARGS)

# In two processes, but for the tests that look at time and memory themselves.
ALONE = tests/test_measuring.py
test: install lint
	$(BIN)/python -m pytest tests -m "not verify" -rs -n 2 --dist loadfile --ignore $(ALONE) $(ARGS)
	$(BIN)/python -m pytest $(ALONE) -m "not verify" -rs $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run scripts/*.sh
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; \
	  else echo "no hadolint for this platform: the Dockerfile is not checked"; fi
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint; \
	  else echo "no actionlint for this platform: the workflows are not checked"; fi

PARTS ?= all
verify: install
	$(BIN)/python scripts/verify.py $(PARTS)

overhead: install
	$(BIN)/python scripts/overhead.py $(ARGS)

calibration: install
	$(BIN)/python scripts/calibration.py $(ARGS)

costs: install
	$(BIN)/python scripts/costs.py docs/ppo.md results/*/*/*.json

against-full: install
	$(BIN)/python scripts/against_full.py docs/against-full.md $(sort $(wildcard results/*/*/*.json))

growth: install
	$(BIN)/python scripts/growth.py $(ARGS)

scale: install
	$(BIN)/python scripts/scale.py $(ARGS)

sweep: install
	$(BIN)/python scripts/sweep.py $(ARGS)

# TRL 1.12, the last with a PPO, needs an environment of its own.
PEERS_VENV ?= .venv-peers-trl-1.12
$(PEERS_VENV)/.installed: scripts/peers/requirements-trl-1.12.txt
	@test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then $(PEERS_VENV)/bin/python -m pip install \
	  --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' $<)"; fi
	$(PEERS_VENV)/bin/python -m pip install --quiet --progress-bar on -r $<
	@touch $@

peers: install $(PEERS_VENV)/.installed
	$(BIN)/python scripts/peers/run.py $(PARTS) --trl-1.12 $(PEERS_VENV)/bin/python

COMMIT = $(shell git rev-parse HEAD 2>/dev/null)
build:
	@command -v $(DOCKER) >/dev/null || { echo "peftbench: $(DOCKER) is not installed; install it, or use LOCAL=1 with train and infer" >&2; exit 2; }
	$(DOCKER) build --build-arg COMMIT=$(COMMIT) --build-arg TORCH_INDEX=$(TORCH_INDEX) -t $(IMAGE) .

# one line for what was left out; what is unknown, peftbench itself says
MISSING = $(if $(PEFT),,PEFT)$(if $(PEFT)$(MODEL),, and )$(if $(MODEL),,MODEL)
.PHONY: named
named:
	@test -z "$(MISSING)" || { echo "peftbench: $(MISSING) $(if $(PEFT)$(MODEL),is,are) missing; for example: make train PEFT=lora MODEL=$(or $(MODEL),gpt-2) ('peftbench list' has the names)" >&2; exit 2; }

train: named $(if $(LOCAL),install)
	@$(RUN) train --model $(MODEL) --adapter $(PEFT) --method $(METHOD) $(if $(DATA),--data $(DATA)) $(ARGS)

infer: named $(if $(LOCAL),install)
	@$(RUN) infer --model $(MODEL) --adapter $(PEFT) $(ARGS)

shell: $(if $(LOCAL),install)
	@$(if $(LOCAL),PATH="$(abspath $(BIN)):$$PATH" $${SHELL:-sh},scripts/image.sh shell)

image-check:
	scripts/image_check.sh

glossary: install
	$(BIN)/python scripts/glossary.py README.md
	$(BIN)/python scripts/glossary.py README.es.md

clean:
	rm -rf $(VENV) $(PEERS_VENV) output .pytest_cache .mypy_cache .ruff_cache *.egg-info
