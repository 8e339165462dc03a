#!/usr/bin/env bash
# One command for a machine with a GPU and no network: tests of the Triton plans on it, then the benchmark.
#
#   bench/gpu.sh                      results and logs in bench/results/, or in $OUT
#   PEER_WHEELS=folder bench/gpu.sh   with the wheels of liger-kernel and cut-cross-entropy found there
#   bench/gpu.sh --states FILE        also on hidden states of a trained model (bench_consistency_loss_gpu.py says which)
#   bench/gpu.sh --dry-run            the same paths on a CPU: Triton's interpreter, tiny shapes
#
# Needs python3 (or $PYTHON) with torch, triton, transformers, pytest, pytest-xdist and hypothesis; installs nothing and builds nothing.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT=${OUT:-$root/bench/results}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=() dry=
while [ $# -gt 0 ]; do
    case $1 in
    --states) # another folder is the current one below
        options+=(--states "$(realpath "${2:?--states needs a file}")")
        shift
        ;;
    --dry-run) dry=1 options+=("$1") ;;
    *) options+=("$1") ;;
    esac
    shift
done
mkdir -p "$OUT" "$work/engine"
# laid out as installed: kernels/ is engine.kernels
cp -r "$root/engine/." "$work/engine/"
cp -r "$root/kernels" "$work/engine/kernels"
cp -r "$root/tests" "$root/bench" "$root/pyproject.toml" "$work/"
cd "$work" || exit 1
export PYTHONPATH=$work PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if compgen -G "${PEER_WHEELS:-/nonexistent}/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$PEER_WHEELS"/*.whl &&
        export PYTHONPATH=$work:$work/peers
fi

status=0
if [ "$dry" ]; then
    export TRITON_INTERPRET=1
    timeout 200 "$python" -m pytest -p no:cacheprovider -W ignore -x tests/kernels/consistency_loss_triton_cases.py \
        -k "several_drafts" 2>&1 | tee "$OUT/consistency_loss_gpu_tests.log" || status=1
else
    unset TRITON_INTERPRET
    # Triton compiles hundreds of variants: that is what takes the time, on the CPU
    timeout 200 "$python" -m pytest -n "${JOBS:-8}" -p no:cacheprovider -W ignore \
        tests/kernels/consistency_loss_triton_cases.py tests/kernels/consistency_loss_triton_sparse_cases.py 2>&1 | tee "$OUT/consistency_loss_gpu_tests.log" || status=1
fi
timeout 330 "$python" -m bench.bench_consistency_loss_gpu --seconds 270 "${options[@]}" 2>&1 |
    tee "$OUT/consistency_loss_gpu.log" || status=1
exit $status
