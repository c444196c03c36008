#!/usr/bin/env bash
# Everything that needs a GPU, on any machine with one: the tests, the demo, the benchmarks; all of it, or by part.
#     bench/on_gpu.sh [RESULTS_FOLDER [PART ...]]
# A part is tests, architectures-tests, demo, or a benchmark (`auxstream bench --list`); each stays under ten minutes.
# Expects torch >= 2.11 and the other dependencies in the current interpreter; installs this checkout into it, editable.
set -u
results=${1:-build/gpu-results}
shift || true
mkdir -p "$results"
export PYTHONUNBUFFERED=1 COLUMNS=120
failed=0 benchmarks=()
part() {
    local limit=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
run() {
    case $1 in
    tests) part 580 tests python3 -m pytest -q tests --ignore tests/end_to_end/test_models.py ;;
    architectures-tests) part 580 architectures-tests python3 -m pytest -q tests/end_to_end/test_models.py ;;
    demo) part 200 demo python3 -m auxstream demo --json "$results/demo.json" ;;
    *) benchmarks+=("$1") ;;
    esac
}
python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
all=0
[ $# -gt 0 ] || { all=1; set -- tests architectures-tests demo; }
for name in "$@"; do run "$name"; done
if [ $all -eq 1 ] || [ ${#benchmarks[@]} -gt 0 ]; then
    part 1600 bench python3 -m auxstream bench --json "$results" "${benchmarks[@]}"
fi
exit $failed
