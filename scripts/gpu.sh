#!/bin/sh
# `make gpu`: everything that only a machine with an NVIDIA GPU can tell, in one go of less than nine minutes.
#
# The whole battery with the real `cuda` and `triton` backends; every instruction family of the PTX interpreter beside the
# hardware (goldens); compute-sanitizer over a few cases; every op beside its peers. Full logs go to $OUT, the table
# comes last. Each part has its time limit, so that one that hangs does not cost the others.
set -u
cd "$(dirname "$0")/.."
python="${PY:-python3}" out="${OUT:-gpu-output}"
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || { echo "no GPU"; exit 1; }

part() {  # name, seconds, command...
  name=$1 limit=$2
  shift 2
  begin=$(date +%s)
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $(($(date +%s) - begin)) s: $(grep -v '^$' "$out/$name.log" | tail -n 1)" | tee -a "$out/summary.txt"
}

: > "$out/summary.txt"
part build 150 env LLMKERNELS_BUILD_TESTS=1 "$python" setup.py -q build_ext --inplace
part goldens 60 "$python" -m tests.ptxsim.goldens --write
part tests 180 "$python" -m pytest -q tests/ops tests/test_reliability.py tests/test_triton_aot.py
for tool in memcheck racecheck initcheck synccheck; do
  part "$tool" 25 compute-sanitizer --error-exitcode 9 --tool "$tool" \
    "$python" -m pytest -q tests/ops/test_battery.py -k "test_matches and [cuda- and (5x33 or 40x1030)" -p no:cacheprovider
done
part bench 150 "$python" -m llmkernels.cli bench --device cuda --seconds 0.5 --json "$out/all.json"
part cuda_check 20 "$python" -m llmkernels.cli check --device cuda
cat "$out/summary.txt"
