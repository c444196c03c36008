#!/usr/bin/env bash
# Everything that needs a GPU, on any machine with one: the tests, the demo, the benchmarks; all of it, or by part.
#     bench/on_gpu.sh [RESULTS_FOLDER [PART ...]]
# Each part stays under ten minutes. A part is what stands behind `part` below: tests, architectures-tests, demo, ...
# Expects torch >= 2.11 and the other dependencies in the current interpreter; installs this checkout into it, editable.
set -u
results=${1:-build/gpu-results}
shift || true
wanted=" $* "
mkdir -p "$results"
export PYTHONUNBUFFERED=1 COLUMNS=120
failed=0
part() {
    local limit=$1 name=$2
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
measure() {
    local limit=$1 name=$2 module=$3
    shift 3
    part "$limit" "$name" python3 -m "auxstream.$module" --json "$results/$name.json" "$@"
}
python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
part 580 tests python3 -m pytest -q tests --ignore tests/end_to_end/test_models.py
part 580 architectures-tests python3 -m pytest -q tests/end_to_end/test_models.py
part 200 demo python3 -m auxstream demo --json "$results/demo.json"
measure 100 handoff bench.handoff
measure 580 fusion bench.fusion
measure 300 ffn bench.ffn
measure 580 decode bench.decode
measure 300 capture bench.capture
for kernels in experts router attention products; do
    measure 300 "$kernels" "bench.$kernels"
done
measure 500 memory bench.memory
measure 300 first-replay bench.first_replay
for batch in 1 8 32; do
    measure 590 "decode-$batch" bench.models --parts decode --batch $batch
    measure 590 "rival-$batch" bench.models --parts decode --batch $batch --variants "chosen by measuring" --reduce-overhead
done
measure 590 prefill bench.models --parts prefill
for k in 1 2 3; do
    measure 590 "architectures-$k" bench.models --architectures --part $k/3
done
exit $failed
