# `make` or `make help` lists the targets. PYTHON=python3.12 picks the interpreter, CXX the compiler, WORKERS=0 runs the
# tests in one process.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo docs about-test test oracle peer-suite check compare lint format werror neon cuda-check wheelhouse gpu-test gpu-bench bench race tool-race torture faults fuzz sanitize sanitize-quick wheel sbom hashes paper paper-quick paper-real paper-real-quick demo-live clean distclean

PYTHON ?= python3
SIZE ?= 1b
WORKERS ?= auto
VENV := .venv
DEMO_VENV := .venv-demo
ORACLE_VENV := .venv-oracle
PY := $(VENV)/bin/python
SANITIZED := tests/numerics tests/execute tests/output/test_checksum.py tests/verification
SANITIZED_QUICKLY := tests/numerics/test_pump.py tests/numerics/test_steps.py tests/numerics/test_decoders.py tests/execute/test_merge.py \
  tests/execute/test_mapped.py tests/output/test_checksum.py tests/verification/test_torn.py
SHARED := -n $(WORKERS) --dist worksteal

# nvcc takes most of the time where it is used; FASTINTERP_CUDA=0 is for the build and for the tests.
ifneq ($(FASTINTERP_CUDA),0)
ifneq ($(shell command -v nvcc),)
NVCC_BUILD := , and ten more for the CUDA kernels (none with FASTINTERP_CUDA=0)
NVCC_TESTS := , some of it nvcc's (not with FASTINTERP_CUDA=0)
endif
endif

# For every pip, those inside isolated builds included; newer ones read the second name there.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Byte code is kept, whatever the shell says: without it, each start of the tests takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

BUILD_FILES := pyproject.toml constraints.txt release/hashes.txt setup.py CMakeLists.txt
NATIVE := $(shell find csrc -type f)
PACKAGE := $(shell find fastinterp kernels -name '*.py' -o -name '*.pyi')
CXX_FILES := $(shell find csrc tests -not -path '*/third_party/*' \( -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' \))

define CHECK_PYTHON
import importlib.util, os, shutil, sys, sysconfig
def need(ok, message):
    if not ok: sys.exit("fastinterp: " + message)
need(sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, but {sys.executable} is {sys.version.split()[0]}. "
     "Name another: make PYTHON=python3.12 ...")
need(all(map(importlib.util.find_spec, ("venv", "ensurepip"))), f"{sys.executable} cannot make virtual environments. "
     "On Debian or Ubuntu: apt install python3-venv")
need(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")), f"{sys.executable} has no C headers "
     "(Python.h). On Debian or Ubuntu: apt install python3-dev")
need(any(map(shutil.which, [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"])),
     "no C++ compiler found. On Debian or Ubuntu: apt install g++")
endef
export CHECK_PYTHON

# $(call make_venv,FOLDER)
define make_venv
@command -v $(PYTHON) >/dev/null || { echo "fastinterp: no $(PYTHON) on PATH. Name another: make PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c "$$CHECK_PYTHON"
@test -x $(1)/bin/python || { echo "making the virtual environment $(1)"; $(PYTHON) -m venv --clear $(1); }
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# ---- environments ---------------------------------------------------------------------------------------------------

# What pip and the compiler say goes into a file. Steps of the build are shown as they are done; if it fails, the end of that file.
define SHOW_STEPS
import re, sys
said = []
for line in sys.stdin:
    said.append(line)
    if step := re.search(r"\[\d+/\d+\] .*", line):
        print("  " + step[0], flush=True)
    elif re.match(r" *(Collecting|Installing collected|Successfully)", line):
        print("  " + line.strip()[:100], flush=True)
if said and said[-1] == "fastinterp: the build failed\n":
    sys.exit("".join(said[-40:]) + f"All that was said is in {sys.argv[1]}")
endef
export SHOW_STEPS

# $(call shown,COMMAND,NAME)
define shown
@mkdir -p build; { $(1) 2>&1 || echo "fastinterp: the build failed"; } | tee build/$(2).log | $(PYTHON) -c "$$SHOW_STEPS" build/$(2).log
endef

# Without torch and CUDA, else from the same kind of wheel that a user gets. Old copies of the package must not get into the wheel.
$(DEMO_VENV)/.installed: $(BUILD_FILES) $(NATIVE) $(PACKAGE)
	$(call make_venv,$(DEMO_VENV))
	@echo "building and installing fastinterp in $(DEMO_VENV): one to five minutes of a processor"
	@rm -rf build/lib*
	$(call shown,FASTINTERP_CUDA=0 $(DEMO_VENV)/bin/python -m pip install --verbose .,demo)
	@touch $@

# Everything that tests and lint need, CPU torch included, and fastinterp itself from this source tree.
$(VENV)/.installed: pyproject.toml constraints.txt release/hashes.txt
	$(call make_venv,$(VENV))
	@echo "installing the tools, torch and fastinterp in $(VENV): a few minutes the first time"
	$(call shown,$(PY) -m pip install --require-hashes -r release/hashes.txt,tools)
	$(call shown,$(PY) -m pip install --verbose --no-build-isolation --editable '.[dev]',install)
	@touch $@ $(VENV)/.built

# The editable install above has built the extension; this does it again when the sources have changed. Make looks for .built before that
# install, so the recipe looks again.
$(VENV)/.built: $(VENV)/.installed setup.py CMakeLists.txt $(NATIVE)
	@[ -e $@ ] && [ -z "$$(find setup.py CMakeLists.txt $(NATIVE) -newer $@)" ] || { echo "building the extension" && $(PY) setup.py --quiet build_ext --inplace; }
	@touch $@

# mergekit, sd-mecha and Ray ask for many packages of their own, so they do not share the environment of the tests.
$(ORACLE_VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(ORACLE_VENV))
	@echo "installing mergekit, sd-mecha and Ray in $(ORACLE_VENV): a minute the first time"
	$(ORACLE_VENV)/bin/python -m pip install --quiet mergekit==0.1.5 sd-mecha==1.1.8 ray click msgspec pytest pytest-xdist
	@touch $@

# mergekit's source distribution has its tests, but for tests/common.py: tests/peer/common.py stands in for that.
build/peer/pytest.ini: constraints.txt $(ORACLE_VENV)/.installed
	rm -rf build/peer && mkdir -p build/peer
	$(ORACLE_VENV)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest build/peer mergekit==0.1.5
	cd build/peer && tar --extract --gzip --strip-components=1 --file mergekit-0.1.5.tar.gz --wildcards '*/tests/*'
	printf '[pytest]\n' > $@

$(VENV)/.bench: $(VENV)/.built
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev,bench]'
	@touch $@

# ---- targets --------------------------------------------------------------------------------------------------------

demo: $(DEMO_VENV)/.installed ## build, install without torch, merge small models in several ways, and leave them in build/demo
	@$(DEMO_VENV)/bin/python examples/demo.py build/demo --again
	@echo; echo "They are in build/demo. Go on there:"
	@echo '  $$ . $(DEMO_VENV)/bin/activate && cd build/demo'
	@echo '  $$ fastinterp diff chat code'
	@echo '  $$ fastinterp interpolate chat code out/path --alpha 0:1:0.25'

# Not --quiet, which would hide warnings from --strict. The theme prints an advertisement unless it is told not to.
docs: $(VENV)/.built ## the documentation as a site, into build/site; python3 -m http.server -d build/site shows it
	@$(PY) -c "import material" 2> /dev/null || { echo "fastinterp: the tools for the site need Python 3.11.5 or newer" >&2; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

test: about-test $(VENV)/.built ## the whole test suite, and before it what it takes
	@FASTINTERP_REQUIRE=scalar $(PY) -m pytest $(SHARED)

about-test:
	@test -e $(VENV)/.installed || echo "make test installs torch and the test tools in $(VENV) first: 3 GB to download and 7 GB on disk" \
	  "from plain PyPI, 0.5 and 2 GB with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	@test -e $(VENV)/.built || echo "then it builds the extension: one to five minutes of a processor$(NVCC_BUILD)"
	@echo "the tests take 15 to 25 minutes on two processors$(NVCC_TESTS); make check runs the quick ones"

oracle: $(VENV)/.built $(ORACLE_VENV)/.installed ## every method of mergekit, and recipes of sd-mecha, compared with them
	@FASTINTERP_REQUIRE=mergekit,sd_mecha PYTHONPATH="$(CURDIR)" $(ORACLE_VENV)/bin/python -m pytest $(SHARED) tests/methods/test_oracle_deltas.py \
	  tests/methods/test_oracle_gram.py tests/integrations/test_mergekit.py tests/integrations/test_sd_mecha.py

peer-suite: $(VENV)/.built $(ORACLE_VENV)/.installed build/peer/pytest.ini ## mergekit's own tests, with this engine installed in it
	@cd build/peer && PYTHONPATH="$(CURDIR)" "$(CURDIR)/$(ORACLE_VENV)/bin/python" -m pytest --quiet -p tests.peer.plugin tests

check: lint ## lint and the quick tests, those of accelerators left out: under a minute
	@$(PY) -m pytest --quiet -m "not slow" --ignore=tests/devices $(SHARED)

compare: $(VENV)/.built ## the bytes of all outputs, against those of another build: BEFORE=its Python, or its folder
	@test -n "$(BEFORE)" || { echo "fastinterp: BEFORE= names a Python or a source tree with the other build" >&2; exit 2; }
	@$(PY) -m benchmarks.compare_builds "$(BEFORE)" "$(or $(AFTER),$(PY))"

lint: $(VENV)/.built ## ruff, mypy, clang-format, codespell; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/codespell

format: $(VENV)/.built ## format Python and C++, and mend what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# The CUDA sources are compiled so by the tests, for every architecture and for the host.
werror: $(VENV)/.built ## compile with -Wall -Wextra -Werror, in a folder of its own
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" && cmake -S . -B build/werror -G Ninja --fresh -DFASTINTERP_WERROR=ON -DFASTINTERP_CUDA=0 \
	  -DPython_EXECUTABLE="$(CURDIR)/$(PY)" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" --log-level=WARNING \
	  && cmake --build build/werror

neon: ## cross-compile the kernels for aarch64 and test them under qemu-user
	@tests/numerics/neon/run.sh

cuda-check: $(VENV)/.built ## compile the CUDA kernels for every architecture, and look at what became of them
	@FASTINTERP_REQUIRE=nvcc FASTINTERP_CUDA_ARCHITECTURES=75,80,90,100,120 $(PY) -m pytest tests/devices/cuda/test_cuda_compile.py

# The machine that has the GPU may have no network, and another Python.
WHEELS_PYTHON ?= 3.12
WHEELS := msgspec safetensors hypothesis sortedcontainers ml_dtypes setuptools
wheelhouse: $(VENV)/.installed ## wheels for benchmarks/gpu.sh on a machine without a network, into build/wheelhouse; for WHEELS_PYTHON=3.12
	@rm -rf build/wheelhouse
	@$(PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --platform manylinux2014_x86_64 \
	  --platform manylinux_2_28_x86_64 --platform any --dest build/wheelhouse --constraint constraints.txt $(WHEELS)
	@ls build/wheelhouse

gpu-test: $(VENV)/.built ## on a machine with a GPU: the same bytes everywhere, no bad access, no race
	@ONLY=tests PYTHON="$(CURDIR)/$(PY)" benchmarks/gpu.sh

gpu-bench: $(VENV)/.built ## on a machine with a GPU: its speed, into benchmarks/results/gpu.json
	@ONLY=speed PYTHON="$(CURDIR)/$(PY)" benchmarks/gpu.sh

bench: $(VENV)/.bench ## the kernel benchmarks
	@$(PY) -m pytest benchmarks --benchmark-only

race: $(VENV)/.built ## whole commands against the alternatives; SIZE=1b picks the models
	@$(VENV)/bin/fastinterp bench --size $(SIZE)

tool-race: $(VENV)/.built $(ORACLE_VENV)/.installed ## mergekit, torch, peft and sd-mecha with this engine behind them and without: rows of a table; SIZE=1b
	@test -d build/race-$(SIZE)/ft2 || $(VENV)/bin/fastinterp bench --size $(SIZE) --models build/race-$(SIZE) --runs 1 --against copy
	@PYTHONPATH="$(CURDIR)" $(ORACLE_VENV)/bin/python -W ignore -m benchmarks.installed build/race-$(SIZE)
	@PYTHONPATH="$(CURDIR)" $(ORACLE_VENV)/bin/python -W ignore -m benchmarks.tools

# ---- attacks --------------------------------------------------------------------------------------------------------

torture: $(VENV)/.built ## kill commands 200 times at random moments, and compare what the next run makes: ten minutes or more
	@$(PY) -m tests.attacks.kills
	@FASTINTERP_LONG=1 $(PY) -m pytest -m long $(SHARED)

faults: $(VENV)/.built ## make the first 50 of each system call fail, one by one: ten minutes or more
	@$(PY) -m tests.support.fault_survey

# A million inputs together.
FUZZ_RUNS ?= 80000
FUZZ_TARGETS := header file index config adapter receipt receipt-file journal bin pickle gguf recipe tokenizer tokenizer-config report
$(VENV)/.fuzz: $(VENV)/.built
	$(PY) -m pip install --quiet atheris
	@touch $@

fuzz: $(VENV)/.fuzz ## damaged files of every kind that is read, guided by coverage: an hour or two; FUZZ_RUNS=1000 is quick
	@rm -rf build/fuzz/*/crashes
	@for target in $(FUZZ_TARGETS); do echo "$$target"; $(PY) -m tests.attacks.fuzz $$target -runs=$(FUZZ_RUNS) > build/fuzz-$$target.log 2>&1 || \
	  { tail -n 30 build/fuzz-$$target.log; exit 1; }; grep -h executed_units build/fuzz-$$target.log; done
	@test -z "$$(ls build/fuzz/*/crashes)" || { tail -n 5 build/fuzz/*/crashes/*.txt; exit 1; }

sanitize: $(VENV)/.built ## the native tests and those of whole merges under ASan, UBSan and TSan: an hour
	@tests/attacks/sanitize.sh address $(SANITIZED)
	@tests/attacks/sanitize.sh thread $(SANITIZED)

sanitize-quick: $(VENV)/.built ## some of them under ASan and UBSan, without AVX2 and AVX-512: two or three minutes of a processor
	@BASELINE=1 tests/attacks/sanitize.sh address --quiet -m "not slow" $(SHARED) $(SANITIZED_QUICKLY)

# ---- releases -------------------------------------------------------------------------------------------------------

wheel: $(VENV)/.built ## the wheel of this machine in dist/, tried without a compiler and without torch
	@rm -rf build/wheel build/lib* dist && mkdir -p dist
	@FASTINTERP_CUDA=0 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@if [ "$$(uname)" = Linux ]; then PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist build/wheel/*.whl >build/wheel/auditwheel.log 2>&1 || { cat build/wheel/auditwheel.log; exit 1; }; else cp build/wheel/*.whl dist; fi
	@$(PY) -m release.try_wheel dist/*.whl build/wheel/venv

sbom: wheel ## the software bill of materials of that wheel, in CycloneDX
	@$(PY) -m release.sbom build/wheel/venv dist/fastinterp.cdx.json

hashes: ## pin the tools of release/requirements.in by hash, in the versions of constraints.txt; needs uv
	@uv pip compile --quiet --universal --generate-hashes --python-version 3.10 --constraint constraints.txt --no-config \
	  --custom-compile-command "make hashes" release/requirements.in -o release/hashes.txt

# What is trained already, with the same settings, is kept: an interrupted run goes on where it was.
paper: $(VENV)/.bench ## reproduce the paper's claim on a toy: three seeds, 45 to 70 minutes; renews docs/paper
	@$(PY) -m examples.paper_path.train build/paper
	@$(PY) -m examples.paper_path.sweep build/paper
	@$(PY) -m examples.paper_path.report build/paper -o docs/paper --page docs/paper.md

paper-quick: $(VENV)/.built ## the same in a minute or two: one seed, fewer steps, the main line alone
	@$(PY) -m examples.paper_path.train build/paper-quick --quick --seeds 0
	@$(PY) -m examples.paper_path.sweep build/paper-quick --quick --seeds 0
	@$(PY) -m examples.paper_path.report build/paper-quick --quick

paper-real: $(VENV)/.bench $(ORACLE_VENV)/.installed ## the claim on a pretrained model of 135 M parameters, from PyPI: three seeds; renews docs/real-model
	@$(PY) -m examples.real_path.main build/real_path
	@$(PY) -m examples.real_path.speed build/real_path
	@$(PY) -m examples.real_path.report build/real_path -o docs/real-model --page docs/real-model.md

paper-real-quick: $(VENV)/.built ## the same in two minutes: 25 steps each, three alphas
	@$(PY) -m examples.real_path.main build/real_path-quick --quick
	@$(PY) -m examples.real_path.report build/real_path-quick --quick

demo-live: $(VENV)/.built ## `fastinterp explore` on these models: reviews from pan to praise; trains for three minutes if there are none
	@$(PY) -m examples.real_path.demo build/real_path build/demo-live

clean: ## remove what the build made
	rm -rf build dist fastinterp.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastinterp/_C.*.so fastinterp/_cuda.*.so $(VENV)/.built $(DEMO_VENV)/.installed
	find fastinterp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environments
	rm -rf $(VENV) $(DEMO_VENV) $(ORACLE_VENV)
