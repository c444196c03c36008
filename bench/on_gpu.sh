#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on any machine with one: the tests, the demo, the benchmarks.
#     bench/on_gpu.sh [RESULTS_FOLDER]
# Expects torch >= 2.11 and the other dependencies in the current interpreter; installs this checkout into it, editable.
set -u
results=${1:-build/gpu-results}
mkdir -p "$results"
export PYTHONUNBUFFERED=1 COLUMNS=120
failed=0
step() {
    local limit=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
step 300 tests python3 -m pytest -q tests
step 200 demo python3 -m auxstream demo --json "$results/demo.json"
step 100 handoff python3 -m auxstream.bench.handoff --json "$results/handoff.json"
step 600 fusion python3 -m auxstream.bench.fusion --json "$results/fusion.json"
step 300 ffn python3 -m auxstream.bench.ffn --json "$results/ffn.json"
step 600 decode python3 -m auxstream.bench.decode --json "$results/decode.json"
step 300 capture python3 -m auxstream.bench.capture --json "$results/capture.json"
exit $failed
