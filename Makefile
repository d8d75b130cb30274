# Each target sets up what it needs in .venv; nothing has to be installed by hand but Python, a C++ compiler and git.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f)
# make CONSTRAINTS=constraints.txt ...: the versions that development and CI last ran with, instead of the newest.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %)

.PHONY: demo stranger test test-minimum peers test-peers bench docs lint audit format cpp cuda-report cuda-build dependencies wheels dist environment sanitize fuzz mutants coverage rates clean

# The main job on real data: how many samples of each source to train with.
demo: $(VENV)/.installed-cli
	@mkdir -p demo
	$(BIN)/transferops otqms --output demo --json demo/otqms.json

# What the documentation tells a newcomer to type, in an environment of its own.
stranger:
	$(PYTHON) scripts/strangers_path.py $(TORCH)

# Files are spread over the processors in their own order, not those with few tests last: these take longest. Compilers of
# the emulated kernels come first, and take one processor while tests run on another.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The op tests against kernels built with AddressSanitizer and UndefinedBehaviorSanitizer; then threads under ThreadSanitizer.
sanitize: $(VENV)/.installed-test
	scripts/sanitize.sh $(BIN)/python
	scripts/sanitize_threads.sh

# Ten minutes of random examples of every public function; a summary goes to bench/results/fuzz.json.
fuzz: $(VENV)/.installed-test
	$(BIN)/python tests/fuzz/run.py

# Every mistake that is known to be noticed by the tests of the CUDA kernels; `make test` tries one in 48.
mutants: $(VENV)/.installed-test
	TRANSFEROPS_MUTANTS=all $(BIN)/python -m pytest tests/kernels/test_mutants.py

# Lines of Python and C++ that the tests run; lists of the others are left in build/coverage.
coverage: $(VENV)/.installed-test
	$(PIP) "coverage>=7.10" "gcovr>=8.3"
	scripts/coverage.sh $(BIN)/python

# How often intervals cover and tests err, 10,000 times each; into bench/results/rates.json.
rates: $(VENV)/.installed-test
	$(BIN)/python tests/rates.py

# pytest-benchmark, one file per family; writes JSON and a Markdown table under bench/results.
bench: $(VENV)/.installed-bench
	$(BIN)/python bench/run.py

# The documentation as a site under build/site; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-lint $(VENV)/.installed-cli
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# Known vulnerabilities of the versions in constraints.txt; asks pypi.org, so that CI takes this step where that answers.
# Strict: a version that could not be looked up is a failure, and not "no known vulnerabilities". In an environment of its
# own, since what pip-audit needs has no place among the project's.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

# The C++ library, installed, and a program built against it through find_package(transferops).
cpp: $(VENV)/.torch
	scripts/check_cpp_embedder.sh $(BIN)/python

# Registers, spills and shared memory of every CUDA kernel, compiled for sm_90, and the bindings; needs nvcc, no GPU.
cuda-report: $(VENV)/.installed-cuda-report
	@mkdir -p build
	$(BIN)/python scripts/cuda_report.py --output build/cuda_report.md
	scripts/check_cuda_bindings.sh $(BIN)/python

# The full build against a CUDA torch, imported without a GPU; needs nvcc, several GB and some ten minutes.
cuda-build:
	scripts/check_cuda_build.sh

# The tests with the oldest versions that pyproject.toml allows; several GB for the oldest torch.
test-minimum:
	scripts/test_minimum.sh $(PYTHON)

# The packages that integrations are for; $(TORCH) again, which some of these would upgrade. BackPACK declares torchvision
# but does not import it; PyPI's, built for CUDA, breaks imports of transformers beside a CPU torch.
peers: $(VENV)/.installed-test
	$(PIP) $(TORCH) --no-build-isolation -e ".[test,bench,laplace,curvlinops,backpack]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision

test-peers: peers
	$(BIN)/python -m pytest tests/test_compat.py tests/test_integrations*.py tests/test_same_score.py

# docs/dependencies.md and constraints.txt from all that any extra needs.
dependencies: peers
	$(PIP) --no-build-isolation -e ".[docs,lint,tensorboard]"
	$(BIN)/python scripts/dependencies.py page >docs/dependencies.md
	$(BIN)/python scripts/dependencies.py constraints >constraints.txt

# CPU wheels in dist/wheels; in manylinux containers by cibuildwheel, which takes the same steps.
wheels:
	scripts/build_wheels.sh $(PYTHON)

# Both from the tree, whose objects are there already. That what is shipped builds by itself is shown by `make stranger`,
# in a copy of the tracked files, all of which the sdist has to hold.
dist: $(VENV)/.installed-dist
	rm -rf dist/*.whl dist/*.tar.gz build/lib* build/bdist*
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist .
	$(BIN)/python scripts/check_dist.py dist

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.22" ninja numpy
	touch $@

# Editable, so that Python sources are those of the tree; the extension is rebuilt when a source of it changes.
$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e ".[$*]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.torch pyproject.toml
	$(PIP) "ruff>=0.9" "mypy>=1.13" "clang-format>=19"
	touch $@

$(VENV)/.installed-cuda-report: $(VENV)/.torch
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

$(VENV)/.installed-dist: $(VENV)/.torch
	$(PIP) build
	touch $@

# All of .venv that CI needs. One pip after the other, also where make runs other targets side by side.
environment:
	$(MAKE) --jobs 1 $(patsubst %,$(VENV)/.installed-%,test cli docs lint cuda-report dist)

clean:
	rm -rf build dist demo $(VENV) transferops/_C.* *.egg-info
