#!/usr/bin/env bash
# One command that certifies a machine with a GPU and no network: tests of every Triton kernel and of the engine on it, then timings.
#
#   bench/gpu.sh                      results and logs in bench/results/, or in $OUT; under 9 minutes
#   bench/gpu.sh --stages tests,loss  of: tests, sanitizer, kernels, engine, loss; all of these by default
#   bench/gpu.sh --stages tune        times candidates for the kernels' tiles, for somebody to write the best into the tables
#   bench/gpu.sh --seconds 300        for all stages together; default 520. Each has its part, and what those before it left
#   bench/gpu.sh --models LIST        of the stage engine: gemma-2-9b, gemma-2-2b, llama-3-8b
#   bench/gpu.sh --states FILE        the loss also on hidden states of a trained model (bench_consistency_loss_gpu.py says which)
#   bench/gpu.sh --dry-run            the same paths on a CPU: Triton's interpreter, tiny shapes
#   PEER_WHEELS=folder bench/gpu.sh   with the wheels of liger-kernel, cut-cross-entropy and others found there
#   DIFFPO_COMMIT=name bench/gpu.sh   the commit to note in the results, where the checkout has no .git
#
# Needs python3 (or $PYTHON) with torch, triton, transformers, pytest and hypothesis, better with pytest-xdist too, and the C
# compiler that Triton builds its launcher with ($CC, clang or gcc); installs nothing and builds nothing itself. A stage that
# fails does not stop the others; the exit status is 1 if one did.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
absolute() { realpath -ms -- "$1"; } # another folder is the current one below
export OUT
OUT=$(absolute "${OUT:-$root/bench/results}")
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(absolute "$python")
peers=${PEER_WHEELS:+$(absolute "$PEER_WHEELS")}
path=
IFS=: read -ra entries <<<"${PYTHONPATH:-}"
for entry in ${entries[@]+"${entries[@]}"}; do [ -z "$entry" ] || path+=:$(absolute "$entry"); done
declare -A weights=([tests]=140 [sanitizer]=60 [kernels]=100 [engine]=150 [loss]=80 [tune]=300)
stages=tests,sanitizer,kernels,engine,loss
loss_options=() engine_options=() dry='' total=
while [ $# -gt 0 ]; do
    case $1 in
    --states)
        loss_options+=(--states "$(absolute "${2:?--states needs a file}")")
        shift
        ;;
    --stages)
        stages=${2:?--stages needs a list}
        shift
        ;;
    --models)
        engine_options+=(--models "${2:?--models needs a list}")
        shift
        ;;
    --seconds)
        total=${2:?--seconds needs a number}
        [[ $total =~ ^[1-9][0-9]*$ ]] || {
            echo "--seconds needs a whole number, got $total" >&2
            exit 2
        }
        shift
        ;;
    --dry-run) dry=--dry-run ;;
    --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *)
        echo "unknown option $1; --help lists them" >&2
        exit 2
        ;;
    esac
    shift
done
for stage in ${stages//,/ }; do
    [ "${weights[$stage]-}" ] || {
        echo "unknown stage $stage" >&2
        exit 2
    }
done
if [ -z "${DIFFPO_COMMIT:-}" ] && commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null); then
    changed=$(git -C "$root" status --porcelain ':/' ':(exclude,top)bench/results')
    export DIFFPO_COMMIT=$commit${changed:+-dirty}
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT" "$work/engine"
# laid out as installed: kernels/ is engine.kernels
cp -r "$root/engine/." "$work/engine/"
cp -r "$root/kernels" "$work/engine/kernels"
cp -r "$root/tests" "$root/bench" "$root/pyproject.toml" "$work/"
cd "$work" || exit 1
export PYTHONPATH=$work$path PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DIFFPO_CPU_KERNELS=torch

if compgen -G "${peers:-/nonexistent}/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$peers"/*.whl &&
        export PYTHONPATH=$work$path:$work/peers
fi

failed=()
total=${total:-$([ "$dry" ] && echo 1800 || echo 520)} # seconds; what a stage leaves of its part goes to those behind it
waiting=0
for stage in ${stages//,/ }; do waiting=$((waiting + weights[$stage])); done

wanted() { # name: whether it is; sets the stage's seconds
    [[ ,$stages, == *,"$1",* ]] || return 1
    limit=$(((total - SECONDS) * weights[$1] / waiting))
    waiting=$((waiting - weights[$1]))
}
spare() { # seconds: what a benchmark may begin something in, so that as much is left for what has begun
    echo $((limit > 2 * $1 ? limit - $1 : limit / 2))
}
stage() { # name, command ..: its output is kept as <name>_gpu.log
    local name=$1 started=$SECONDS
    shift
    if [ "$limit" -lt 5 ]; then
        echo "-- $name: no time" | tee "$OUT/${name}_gpu.log"
        failed+=("$name")
        return
    fi
    # interrupted as from a keyboard, so that pytest still says what has failed; ignored where this script runs behind a shell
    timeout -s INT -k 10 "$limit" "$python" -c 'import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "$@" 2>&1 | tee "$OUT/${name}_gpu.log" || failed+=("$name")
    echo "-- $name: $((SECONDS - started)) s of $limit"
}
missing() { # modules: those that this Python lacks
    "$python" -c 'import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' "$@"
}
not_run() { # name, reason
    echo "-- $1: not run: $2" | tee "$OUT/${1}_gpu.log"
}

pytest=("$python" -m pytest -p no:cacheprovider -W ignore)
lacking=$(missing torch triton transformers pytest hypothesis)
if [ "$dry" ]; then
    export TRITON_INTERPRET=1 DIFFPO_LOOP=device
    # some of each file: all of the kernels' are part of `make test`
    cases=(--few "${FEW:-6}") jobs=${JOBS:-2}
else
    unset TRITON_INTERPRET
    # Triton compiles hundreds of variants: that is what takes the time, on the CPU
    cases=() jobs=${JOBS:-12}
fi
if [ "$(missing xdist)" ]; then
    echo "-- tests: one after the other, as pytest-xdist is not installed"
else
    cases+=(-n "$jobs")
fi
files=(tests/kernels/*_triton_*cases.py)
if wanted tests; then
    if [ "$lacking" ]; then
        not_run tests "Python lacks $lacking"
        failed+=(tests)
    else
        OMP_NUM_THREADS=1 stage tests "${pytest[@]}" "${cases[@]}" "${files[@]}" tests/kernels/test_flash_attention.py \
            tests/engine/*_gpu_cases.py
    fi
fi
if wanted sanitizer; then
    if [ "$dry" ]; then
        not_run sanitizer "it is for a GPU"
    elif ! command -v compute-sanitizer >/dev/null; then
        not_run sanitizer "compute-sanitizer is not installed"
    elif [ "$lacking" ]; then
        not_run sanitizer "Python lacks $lacking"
    else
        # two tests of each file, of three files from these functions: so that every kernel is launched
        checked=()
        for file in "${files[@]}"; do
            case $file in
            */consistency_loss_triton_cases.py) checked+=("$file::test_shapes_that_are_multiples_of_nothing") ;;
            */jacobi_triton_cases.py) checked+=("$file::test_pack_with_noise" "$file::test_accept") ;;
            */linear_argmax_triton_cases.py) checked+=("$file::test_every_tile" "$file::test_samples") ;;
            *) checked+=("$file") ;;
            esac
        done
        # each tensor an allocation of its own, so that what lies behind it is nobody's
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitizer compute-sanitizer --tool memcheck --error-exitcode 1 \
            --target-processes all "${pytest[@]}" --few 2 "${checked[@]}"
        # it cannot watch every GPU, in virtual machines above all: that says nothing of the kernels
        if reason=$(grep -i -m 1 'device not supported' "$OUT/sanitizer_gpu.log"); then
            kept=()
            for name in ${failed[@]+"${failed[@]}"}; do [ "$name" = sanitizer ] || kept+=("$name"); done
            failed=(${kept[@]+"${kept[@]}"})
            echo "-- sanitizer: not run: $reason" | tee -a "$OUT/sanitizer_gpu.log"
        fi
    fi
fi
# a case that has begun is finished: the stages stop early enough for one
if wanted kernels; then
    stage kernels "$python" -m bench.gpu.run --stages kernels --seconds "$(spare 20)" $dry
fi
if wanted engine; then
    stage engine "$python" -m bench.gpu.run --stages engine --seconds "$(spare 25)" \
        ${engine_options[@]+"${engine_options[@]}"} $dry
fi
if wanted loss; then
    stage loss "$python" -m bench.bench_consistency_loss_gpu --seconds "$(spare 20)" \
        ${loss_options[@]+"${loss_options[@]}"} $dry
fi
if wanted tune; then
    stage tune "$python" -m bench.gpu.tune --seconds "$(spare 20)" $dry
fi
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
exit $((${#failed[@]} > 0))
