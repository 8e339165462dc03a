#!/usr/bin/env bash
# One command that certifies a machine with a GPU and no network: tests of every Triton kernel and of the engine on it, then timings.
#
#   bench/gpu.sh                      results and logs in bench/results/, or in $OUT; under 9 minutes
#   bench/gpu.sh --stages tests,loss  of: tests, sanitizer, kernels, engine, loss; all by default
#   bench/gpu.sh --states FILE        the loss also on hidden states of a trained model (bench_consistency_loss_gpu.py says which)
#   bench/gpu.sh --dry-run            the same paths on a CPU: Triton's interpreter, tiny shapes
#   PEER_WHEELS=folder bench/gpu.sh   with the wheels of liger-kernel, cut-cross-entropy and others found there
#
# Needs python3 (or $PYTHON) with torch, triton, transformers, pytest, pytest-xdist and hypothesis, and the C compiler that Triton
# builds its launcher with ($CC, clang or gcc); installs nothing and builds nothing itself. A stage that fails does not stop the others; the exit
# status is 1 if one did.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT=${OUT:-$root/bench/results}
python=${PYTHON:-python3}
stages=tests,sanitizer,kernels,engine,loss
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
loss_options=() dry=
while [ $# -gt 0 ]; do
    case $1 in
    --states) # another folder is the current one below
        loss_options+=(--states "$(realpath "${2:?--states needs a file}")")
        shift
        ;;
    --stages)
        stages=${2:?--stages needs a list}
        shift
        ;;
    --dry-run) dry=--dry-run ;;
    *)
        echo "unknown option $1" >&2
        exit 2
        ;;
    esac
    shift
done
for stage in ${stages//,/ }; do
    [[ ,tests,sanitizer,kernels,engine,loss, == *,"$stage",* ]] || {
        echo "unknown stage $stage" >&2
        exit 2
    }
done
mkdir -p "$OUT" "$work/engine"
# laid out as installed: kernels/ is engine.kernels
cp -r "$root/engine/." "$work/engine/"
cp -r "$root/kernels" "$work/engine/kernels"
cp -r "$root/tests" "$root/bench" "$root/pyproject.toml" "$work/"
cd "$work" || exit 1
export PYTHONPATH=$work PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DIFFPO_CPU_KERNELS=torch

if compgen -G "${PEER_WHEELS:-/nonexistent}/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$PEER_WHEELS"/*.whl &&
        export PYTHONPATH=$work:$work/peers
fi

failed=()
declare -A weights=([tests]=150 [sanitizer]=70 [kernels]=100 [engine]=120 [loss]=90)
total=$([ "$dry" ] && echo 1800 || echo 520) # seconds; what a stage leaves of its part goes to those behind it
waiting=0
for stage in ${stages//,/ }; do waiting=$((waiting + weights[$stage])); done

wanted() { # name: whether it is; sets the stage's seconds
    [[ ,$stages, == *,"$1",* ]] || return 1
    limit=$(((total - SECONDS) * weights[$1] / waiting))
    waiting=$((waiting - weights[$1]))
}
stage() { # name, command ..: its output is kept as <name>_gpu.log
    local name=$1 started=$SECONDS
    shift
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$OUT/${name}_gpu.log" || failed+=("$name")
    echo "-- $name: $((SECONDS - started)) s of $limit"
}

pytest=("$python" -m pytest -p no:cacheprovider -W ignore)
if [ "$dry" ]; then
    # what runs on a GPU without being asked: the kernels, and the loop, though without graphs
    export TRITON_INTERPRET=1 DIFFPO_LOOP=device
    # some of each file: all of the kernels' are part of `make test`
    cases=(-n "${JOBS:-2}" --few "${FEW:-6}")
else
    unset TRITON_INTERPRET
    # Triton compiles hundreds of variants: that is what takes the time, on the CPU
    cases=(-n "${JOBS:-12}")
fi
if wanted tests; then
    stage tests "${pytest[@]}" "${cases[@]}" tests/kernels/*_triton_*cases.py tests/kernels/test_flash_attention.py \
        tests/engine/*_gpu_cases.py
fi
if wanted sanitizer; then
    if [ "$dry" ] || ! command -v compute-sanitizer >/dev/null; then
        echo "-- sanitizer: left out, compute-sanitizer is $([ "$dry" ] && echo "for a GPU" || echo "not installed")" | tee "$OUT/sanitizer_gpu.log"
    else
        # each tensor an allocation of its own, so that what lies behind it is nobody's
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitizer compute-sanitizer --tool memcheck --error-exitcode 1 \
            --target-processes all "${pytest[@]}" --few 2 tests/kernels/*_triton_*cases.py
    fi
fi
# a case that has begun is finished: the stages stop early enough for one
if wanted kernels; then
    stage kernels "$python" -m bench.gpu.run --stages kernels --seconds $((limit - 20)) $dry
fi
if wanted engine; then
    stage engine "$python" -m bench.gpu.run --stages engine --seconds $((limit - 25)) $dry
fi
if wanted loss; then
    stage loss "$python" -m bench.bench_consistency_loss_gpu --seconds $((limit - 20)) "${loss_options[@]}" $dry
fi
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
exit $((${#failed[@]} > 0))
