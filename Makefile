# make demo | test | check | mutants | docs | study-small | bench | bench-gpu | profile | clean: each sets up .venv by itself;
# make test-torch211 sets up .venv211, of 5 GB where only PyPI is reached, whose torch is CUDA's.

PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
CONCEPTS := engine/assets/concepts

.PHONY: demo test test-slow test-torch211 mutants sanitize check docs study-small bench bench-gpu profile clean

$(BIN)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/twinstream generate --out $(OUT) --grid --seed 7 \
	    "a photo of a red cat on a beach" "a photo of a blue car in the snow" \
	    "a photo of a green teapot in a room" "a sketch of a purple duck by a river" \
	    "pixel art of an orange house under the night sky" "a photo of a yellow dog in a meadow" \
	    "a photo of a white boat on a beach" "a photo of a pink backpack in a forest" \
	    "a photo of an orange tree in a desert"
	$(BIN)/twinstream generate --out $(OUT)/infusion --grid --seed 3 \
	    --concept $(CONCEPTS)/striped-cat.safetensors \
	    "a photo of a cat on a beach" "a photo of a cat in the snow" \
	    "a photo of a cat under the night sky" "a photo of a cat in a desert"
	$(BIN)/twinstream generate --out $(OUT)/two-concepts --grid --seed 5 \
	    --concept $(CONCEPTS)/striped-cat.safetensors --concept $(CONCEPTS)/rainbow-backpack.safetensors \
	    "a photo of a cat and a backpack in a city" "a photo of a backpack and a cat on a beach"

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

# The oldest torch and Triton that the GPU path serves; this Triton's interpreter needs a NumPy before 2.4.
.venv211/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv211
	.venv211/bin/pip install --quiet torch==2.11.0 triton==3.6.0 'numpy<2.4'
	.venv211/bin/pip install --quiet --editable '.[bench]' 'numpy<2.4' 'pytest>=8.3' 'pytest-xdist>=3.6'
	touch $@

test-torch211: .venv211/.installed
	OMP_NUM_THREADS=1 .venv211/bin/python -m pytest -n 2 tests/kernels tests/backends tests/benchmarks/test_launches.py

mutants: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --count 200 --minutes 25 --file-seconds 150
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.native_mutants

sanitize: $(BIN)/.installed
	CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" $(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/python -m pytest tests/backends/test_native.py tests/backends/test_winograd.py tests/backends/test_small_blocks.py; status=$$?; $(BIN)/python setup.py -q build_ext --inplace --force; exit $$status

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/.docs: $(BIN)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

docs: $(BIN)/.docs
	$(BIN)/python -m benchmarks.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --clean
	@echo site/index.html

study-small: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.tinyworld.study --concepts striped-cat --checkpoints 100 250 \
	    --seeds 1 --judge small --rates "$$(ls benchmarks/results/study-*.json | tail -1)" --out $(OUT)/study-small --result $(OUT)/study-small.json

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.run

bench-gpu: $(BIN)/.installed
	$(BIN)/python -m benchmarks.run --gpu

profile: $(BIN)/.installed
	$(BIN)/python -m benchmarks.profile_step

clean:
	rm -rf .venv .venv211 build dist site *.egg-info $(OUT) .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
