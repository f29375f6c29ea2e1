#!/usr/bin/env bash
# On a machine with a GPU, without a network: builds, tests, sanitizes and measures.
#
#   bash tools/gpu.sh [--only build,test,sanitize,bench]
#
# Needs python3 with a CUDA torch >= 2.10 and pytest, nvcc, cmake. Works on build/gpu; logs go to $OUT, or to build/gpu/logs.
# Every phase that was asked for runs, whatever became of the others; the table of phases comes last.
set -uo pipefail
cd "$(dirname "$0")/.."

phases=build,test,sanitize,bench
if [ "${1:-}" = --only ] && [ $# = 2 ]; then
  phases=$2
elif [ $# != 0 ]; then
  echo "usage: bash tools/gpu.sh [--only build,test,sanitize,bench]" >&2
  exit 2
fi
for phase in ${phases//,/ }; do
  case $phase in build | test | sanitize | bench) ;; *)
    echo "gpu.sh: --only takes build, test, sanitize and bench, got $phase" >&2
    exit 2 ;;
  esac
done

root=$PWD
site=$root/build/gpu/site
logs=${OUT:-$root/build/gpu/logs}
python=${PYTHON:-python3}
mkdir -p "$logs" build/gpu
unset LIPFAST_CPU_CAPABILITY PYTHONHOME
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
for data in "$root/shared/data" "$root/../shared/data"; do
  if [ -d "$data" ]; then export LIPFAST_TEST_DATA=${LIPFAST_TEST_DATA:-$data}; fi
done

has() { (cd / && PYTHONPATH='' "$python" -c "import $1") >/dev/null 2>&1; }

build() {
  local arch pybind=OFF generator=()
  # 90a: Hopper's own instructions; one architecture keeps the build short
  arch=$("$python" -c "
import torch
major, minor = torch.cuda.get_device_capability()
print(f'{major}{minor}' + ('a' if (major, minor) == (9, 0) else '') + '-real')") || return 1
  if has pybind11; then pybind=ON; fi
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B build/gpu "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DLIPFAST_CUDA=ON -DLIPFAST_CUDA_ARCHS="$arch" \
    -DLIPFAST_PYBIND=$pybind -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())' 2>/dev/null)" || return 1
  cmake --build build/gpu --parallel "$(nproc)" || return 1
  # An importable tree, tests beside the package: run from the checkout, they would import its sources without libraries.
  rm -rf "$site" && mkdir -p "$site" || return 1
  tar -c --exclude=./build --exclude=./.git --exclude=./shared --exclude=./bench/results --exclude=./.venv . | tar -x -C "$site" || return 1
  cmake --install build/gpu --prefix "$site" || return 1
  cd "$site" && "$python" -c "
import lipfast, torch
print(torch.__version__, torch.cuda.get_device_name(), lipfast.__file__, lipfast.loaded)
assert lipfast.__file__.startswith('$site'), 'another lipfast comes first'
assert lipfast.loaded['cpu'] and lipfast.loaded['cuda'], 'a library is missing'"
}

tests() {
  local options=()
  cd "$site" || return 1
  if ! has pytest_benchmark; then options+=(-o "addopts=-p no:cacheprovider"); fi
  if has xdist; then options+=(-n 8); export OMP_NUM_THREADS=2; fi
  "$python" -m pytest -q -rs "${options[@]}"
}

sanitize() {
  local tool filter=() status=0
  cd "$site" || return 1
  # only our own kernels: torch's would take most of the time
  if compute-sanitizer --help | grep -q -e '--kernel-name'; then filter=(--kernel-name kns=lipfast); fi
  for tool in memcheck racecheck; do
    echo "compute-sanitizer --tool $tool"
    # without torch's cache each tensor is an allocation of its own, so that a step outside it shows
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool "${filter[@]}" --error-exitcode 1 \
      "$python" tools/sanitize.py || status=1
  done
  return $status
}

bench() {
  local machine results status=0
  cd "$site" || return 1
  machine=$("$python" -c "from bench import record; print(record.machine('cuda'))") || return 1
  results="$root/bench/results/$machine"
  "$python" -m bench --device cuda --dtype float32 tf32 bfloat16 --json "$results/bench.json" || status=1
  "$python" -m bench large --device cuda --json "$results/large.json" || status=1
  if [ -n "${OUT:-}" ]; then cp -R "$results" "$OUT/"; fi
  return $status
}

table=()
failed=0
for phase in ${phases//,/ }; do
  start=$SECONDS
  run=$phase
  if [ $phase = test ]; then run=tests; fi
  if [ $phase != build ] && [ ! -e "$site/lipfast/_ops_cuda.so" ]; then
    result="not run: no build"
  elif ($run) >"$logs/$phase.log" 2>&1 </dev/null; then
    result=passed
  else
    result=FAILED
    echo "== the end of $logs/$phase.log" && tail -n 25 "$logs/$phase.log"
  fi
  if [ "$result" != passed ]; then failed=1; fi
  table+=("$(printf '%-9s %5d s  %s' "$phase" $((SECONDS - start)) "$result")")
done
if [ -s "$logs/test.log" ]; then grep -E '^[0-9]+ (passed|failed)|[0-9]+ passed' "$logs/test.log" | tail -n 1; fi
printf '%s\n' "${table[@]}"
exit $failed
