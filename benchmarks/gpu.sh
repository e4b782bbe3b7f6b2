#!/usr/bin/env bash
# Correctness, then every benchmark, on the NVIDIA GPU that is there, in under 8 minutes: one JSON, pictures, a log.
#
#     benchmarks/gpu.sh        # into $OUT where it is set, else into benchmarks/results/gpu-<name of the GPU>
#
# A part that fails, or for which no time is left, is named at the end and makes the exit status 1; the others run all the same.
# PYTHON names the interpreter: python3 if it is not set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

name=$("$python" - <<'END'
import importlib.util
import sys

wanted = ["torch", "triton", "numpy", "h5py", "tokenizers", "safetensors", "jsonargparse", "tensorboard", "tqdm", "matplotlib",
          "transformers", "pytest", "hypothesis"]
missing = [module for module in wanted if importlib.util.find_spec(module) is None]
if missing:
    remedy = "`pip install -r requirements-dev.txt` brings them; PYTHON=... names another interpreter"
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}. {remedy}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} of {sys.executable} finds no CUDA device")
print(torch.cuda.get_device_name().lower().replace(" ", "-"))
END
) || exit 2
out=${OUT:-benchmarks/results/gpu-$name}
mkdir -p "$out" || exit 2
parts=$(mktemp -d) || exit 2
trap 'rm -rf "$parts"' EXIT
lines=() failed=() end=450  # seconds from the start: the rest is for the pictures and the JSON

# part NAME SECONDS COMMAND...: runs the command, for so long at most, and notes how it went.
part() {
    local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS verdict=ok
    shift 2
    ((limit > left)) && limit=$left
    printf '\n== %s: %s\n' "$name" "$*"
    if ((limit <= 0)); then
        verdict="no time was left"
    else
        timeout --kill-after=5 "$limit" "$@"
        local status=$?
        ((status == 124 || status == 137)) && verdict="stopped after $limit s"
        ((status == 0 || status == 124 || status == 137)) || verdict="failed with exit status $status"
    fi
    [[ $verdict == ok ]] || failed+=("$name")
    lines+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - began)) "$verdict")")
}

pretraining() {  # pretraining NAME SECONDS OPTIONS...: its result is NAME.json
    part "$1" "$2" "$python" benchmarks/pretraining.py --device cuda --lengths wikipedia --json "$parts/$1.json" "${@:3}"
}

main() {
    nvidia-smi
    part correctness 90 "$python" -m pytest -m cuda tests
    part lamb 60 "$python" benchmarks/lamb.py --json "$parts/lamb.json"
    part ops 60 "$python" benchmarks/ops.py --device cuda --json "$parts/ops.json" --plot "$out/ops.png"
    pretraining phase1 120 --config gpu_phase1.json --against transformers --peer-compile
    pretraining phase1-float8 70 --config gpu_phase1.json --training.precision float8
    pretraining phase2 120 --config gpu_phase2.json --against transformers --peer-compile
    part data-wait 60 "$python" benchmarks/data_wait.py --config gpu_phase1.json --training.global_batch_size 16384 \
        --json "$parts/data-wait.json"
    pretraining phase1-large 70 --config gpu_phase1.json --samples 2048 --model.num_hidden_layers 24 --model.hidden_size 1024 \
        --model.num_attention_heads 16 --model.intermediate_size 4096 --ipu.layers_per_ipu '[0, 8, 8, 8]'
    end=475
    shopt -s nullglob
    local results=("$parts"/*.json) pictured=("$parts"/phase*.json)
    ((${#pictured[@]})) && part picture 20 "$python" benchmarks/plot.py "${pictured[@]}" --output "$out/pretraining.png"
    ((${#results[@]})) && part merge 10 "$python" benchmarks/merge.py "${results[@]}" --output "$out/gpu.json"
    printf '\n== %d s in all, results in %s\n' "$SECONDS" "$out"
    printf '%s\n' "${lines[@]}"
    ((${#failed[@]})) || return 0
    echo "failed: ${failed[*]}"
    return 1
}

main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
