#!/bin/sh
# Half an hour on a card: what is unproven first. Run in a clone, on the machine with the card, after `make setup` and, for
# the peers' columns, `make peers`. Every step goes on where it was broken off, and is worth having without the next.
#
#     sh benchmarks/gpu.sh [FOLDER]        # results go into FOLDER, build/card by default
set -u
out=${1:-build/card}
mkdir -p "$out"
python=.venv/bin/python
peers=.venv-peers/bin/python
[ -x "$peers" ] || peers=$python
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/card.txt"

# 1. Is it right? Two minutes.
$python -m pytest -q -m gpu tests/core/test_gpu.py 2>&1 | tee "$out/suite.txt"

# 2. How fast is it? Ten minutes; the share of the data sheet that was reached stands at the end.
$peers benchmarks/gpu.py --out "$out/benchmark.json" 2>&1 | tee "$out/benchmark.txt"

# 3. What would the whole run take here? Then as much of it as there is time for: pieces are kept in results/gpu/pairs.
$python -m masksae plan gpu --measure 2>&1 | tee "$out/plan.txt"
$python -m masksae repro gpu 2>&1 | tee "$out/repro.txt"
