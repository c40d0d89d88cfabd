# One word per intention. Each of `make demo` and `make test` does all the set-up by itself; a second run takes seconds.
#   make demo | examples | test [OP=layer_norm] [BACKEND=cpu] | bench | tables | build | fmt | lint | sanitize
#   gpu | registers | new-op NAME=x | clean
#   VENV=none PYTHON=python3   the interpreter as it is: no virtual environment, no pip, no network
PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),none)
  PY := $(PYTHON)
  DEPS :=
else
  PY := $(VENV)/bin/python
  DEPS := $(VENV)/.installed
  export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo examples test bench tables build fmt lint sanitize gpu registers new-op clean help
help:
	@sed -n '1,4s/^# //p' Makefile

demo: build
	$(PY) -m llmkernels.cli demo $(ARGS)

# All of them, then the table of examples/README.md.
EXAMPLES := lstm_language_model transformer_language_model self_attention_from_scratch bert_classifier \
  lstm_text_classifier digits_classifier llama_chat_decode seq2seq_translation sentence_search
examples: build
	for example in $(EXAMPLES); do $(PY) examples/$$example.py $(ARGS) || exit 1; done
	$(PY) examples/table.py

# The emulated CUDA runtime of tests/ptxsim is built for tests only.
test: export LLMKERNELS_BUILD_TESTS := 1
test: build
	OP=$(OP) BACKEND=$(BACKEND) $(PY) -m pytest -q --durations=10 $(ARGS)

bench: build
	$(PY) benchmarks/run.py $(ARGS)

# The tables of README.md, from the measurements under benchmarks/results.
tables: $(DEPS)
	$(PY) benchmarks/tables.py

build: $(DEPS)
	@$(PY) setup.py -q build_ext --inplace

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

fmt: $(DEPS)
	$(PY) -m ruff format . && $(PY) -m ruff check --fix .
	clang-format -i $$(find csrc tests/ptxsim -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: $(DEPS)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

# AddressSanitizer and UndefinedBehaviorSanitizer: modules of their own, in a copy of the tree.
sanitize: $(DEPS)
	PY="$$(realpath -s "$$(command -v $(PY))")" ARGS="$(ARGS)" sh scripts/sanitize.sh

# On a machine with a GPU: the tests, the goldens of the PTX interpreter, compute-sanitizer, the benchmarks.
gpu: $(DEPS)
	PY="$$(realpath -s "$$(command -v $(PY))")" sh scripts/gpu.sh

# docs/cuda-registers.md, from the built module.
registers: build
	$(PY) scripts/cuda_registers.py

new-op: build
	$(PY) scripts/new_op.py $(NAME)

clean:
	rm -rf build dist *.egg-info llmkernels/*.so llmkernels/_build_facts.json tests/ptxsim/*.so tests/ptxsim/ptx
