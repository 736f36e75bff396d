#!/usr/bin/env bash
# One command for a GPU machine: builds fastbert, runs the GPU tests, measures the ceilings and every subject against
# its peers, and says which targets hold. Under ten minutes, without a network, installing nothing.
#
#     benchmarks/acceptance/gpu.sh [FOLDER]              results go to FOLDER ($OUT, else benchmarks/results)
#     benchmarks/acceptance/gpu.sh --peers [FOLDER]      the ceilings and the public runtimes alone
#     benchmarks/acceptance/gpu.sh --stages 'build ops'  some of: build tests ops models training targets tune
#     benchmarks/acceptance/gpu.sh --tiny [FOLDER]       shows on any machine that all of it runs; measures nothing
#
# Environment: PYTHON (python3), BUDGET (570 seconds for everything), BUILD (the folder build/gpu), FASTBERT_COMMIT (for
# the rows, in a copy without its git history). A stage that fails or runs out of its time does not stop the next; the
# exit status is 0 where all passed and every target holds. `tune` runs where it is named: it measures tiles for
# kernels/linear_table.csv and kernels/configs.py, eight minutes by itself.

set -uo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
stages="build tests ops models training targets"
flags=()
tiny=()
interpreted=()
results=
while [ $# -gt 0 ]; do
  case $1 in
    --peers) flags+=(--peers) stages="ops models training" ;;
    --tiny)
      flags+=(--tiny --seconds 0) tiny=(--tiny) stages="build ops models training tune"
      interpreted=(env TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=)
      ;;
    --stages) stages=${2:?--stages needs a list}; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) results=$1 ;;
  esac
  shift
done
for name in $stages; do
  case $name in
    build | tests | ops | models | training | targets | tune) ;;
    *) echo "gpu.sh: unknown stage $name" >&2; exit 2 ;;
  esac
done
results=${results:-${OUT:-$root/benchmarks/results}}
mkdir -p "$results" && results=$(cd "$results" && pwd) && cd "$root" || exit 1
command -v "$python" >/dev/null || { echo "gpu.sh: no $python; name one with PYTHON=/path/to/python" >&2; exit 1; }

# fastbert as an installed package would be, made of links: kernels/ is fastbert.kernels there (see pyproject.toml), and
# the extension lies next to the Python files.
work=${BUILD:-$root/build/gpu}
site=$work/site
build=$work/cmake
mkdir -p "$site/fastbert" "$build" || exit 1
find "$site/fastbert" -maxdepth 1 -type l -delete
for part in "$root"/fastbert/* "$root/kernels"; do
  case ${part##*/} in __pycache__ | _C*) ;; *) ln -s "$part" "$site/fastbert/" || exit 1 ;; esac
done
# Without the current folder, whose fastbert/ has no kernels.
export PYTHONSAFEPATH=1 PYTHONPATH="$site:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -d /usr/local/cuda/bin ] && export PATH="$PATH:/usr/local/cuda/bin"

log=$results/gpu.log
summary=()
failures=0
deadline=$((SECONDS + ${BUDGET:-570}))

# stage NAME SECONDS COMMAND...: runs it within its time and what is left of the whole. NAME-PART is part of stage NAME.
stage() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status verdict
  shift 2
  case " $stages " in *" ${name%%-*} "*) ;; *) return ;; esac
  [ "$name" = targets ] || left=$((left - 10)) # the verdict comes in any case
  [ "$limit" -lt "$left" ] || limit=$left
  printf '\n== %s\n' "$name" | tee -a "$log"
  if [ "$limit" -lt 1 ]; then
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
  fi
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time (${limit} s)" ;;
    *) verdict="failed ($status)" ;;
  esac
  [ "$status" -eq 0 ] || failures=$((failures + 1))
  summary+=("$(printf '%-14s %5d s  %s' "$name" $((SECONDS - begin)) "$verdict")")
}

# The CPU's code too, and of the GPUs the one that is here.
build_extension() {
  local generator=() architecture
  command -v cmake >/dev/null || { echo "no cmake: fastbert runs without its extension"; return 1; }
  command -v ninja >/dev/null && generator=(-G Ninja)
  architecture=$("$python" -c 'import torch
if torch.cuda.is_available(): print("-DCMAKE_CUDA_ARCHITECTURES={}{}-real".format(*torch.cuda.get_device_capability()))')
  cmake -S "$root/csrc" -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release ${architecture:+"$architecture"} \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$build" --parallel "$(nproc)" && cp "$build"/_C*.so "$site/fastbert/" &&
    "$python" -c 'from fastbert import native
reason = native.available()
print(reason or f"native: {native.isa()}, CUDA {native.has_cuda()}")
raise SystemExit(reason is not None)'
}

gpu_tests() {
  local parallel=()
  "$python" -c 'import pytest' || { echo "pytest is not installed: the GPU tests did not run"; return 1; }
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)") # compiling kernels takes most of the time
  shopt -s nullglob
  # Compiling for other GPUs needs none: that is the ordinary test run's.
  "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" -k "not compiles" \
    "$root"/tests/ops/test_*triton*.py "$root"/tests/inference/test_cuda_graphs.py \
    "$root"/tests/ops/test_packing_device.py
}

export -f build_extension gpu_tests
export root python site build

: >"$log"
{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader 2>/dev/null ||
    echo "no nvidia-smi here"
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
} | tee -a "$log"

suite() { # NAME SECONDS: one script of the suite
  stage "$1" "$2" "$python" "$root/benchmarks/bench_gpu_$1.py" --output "$results/gpu-$1.csv" "${flags[@]}"
}
stage build 150 bash -c build_extension
stage tests 120 bash -c gpu_tests
suite ops 140
suite models 170
suite training 140
stage tune-linear 250 "${interpreted[@]}" "$python" "$root/benchmarks/tune_linear.py" \
  --output "$results/linear_table.csv" "${tiny[@]}"
stage tune-attention 320 "${interpreted[@]}" "$python" "$root/benchmarks/tune_attention.py" \
  --output "$results/tune-attention.csv" "${flags[@]}"
stage targets 30 "$python" "$root/benchmarks/acceptance/gpu_targets.py" "$results"/gpu-*.csv

printf '\n== stages, %d s in all; rows in %s\n' "$SECONDS" "$results" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
[ "$failures" -eq 0 ]
