#!/usr/bin/env bash
# Everything that waits for a GPU, in the order of its worth: the first six commands take seven minutes of an H100.
#   bash benchmarks/gpu.sh [NAME]        only the commands whose names begin so, such as train_lpd_l
# A command ends after its seconds at the latest. It leaves gpu_NAME.log, a benchmark also gpu_NAME.json, in OUT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
cd "$repo"
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZER_EPOCHS=2 LPD_EPOCHS=10 LPD_MODEL=lpd_tiny
chosen=${1:-} out=${OUT:-benchmarks/results} failed=0

run() { # run NAME SECONDS COMMAND...
    [[ $1 == "$chosen"* ]] || return 0
    local log=$out/gpu_$1.log status=0
    timeout "${@:2}" >"$log" 2>&1 || status=$? failed=1
    echo "$1, exit status $status: $(tail -n 1 "$log")"
}
bench() { run "$1" "$2" "$python" "benchmarks/bench_$3.py" --bf16 --output_file "$out/gpu_$1.json" "${@:4}"; }
generate() { bench "generate_$1" "$2" generate --batch_sizes 1 64 --against plain "${@:3}"; }

run card 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
run as_on_cpu 60 "$python" -m pytest -m gpu tests/system/test_gpu.py
run tests 150 "$python" -m pytest -m gpu --ignore tests/system/test_gpu.py
generate lpd_l_256 75
generate lpd_l_256_fused 75 --fused_decoder
bench train_lpd_l_256 60 train

bench evaluate_lpd_l_256 300 evaluate --num_images 10000
for model in lpd_xl lpd_xxl; do generate "${model}_256_fused" 540 --fused_decoder --model "$model"; done
generate lpd_l_512_fused 540 --fused_decoder --grid_size 32
for size in "lpd_l 256 64" "lpd_xl 256 32" "lpd_xxl 256 16" "lpd_l 512 16" "lpd_xl 512 8"; do # as scripts/train
    read -r model pixels batch <<<"$size"
    for flags in "--variants plain" "--attention additive" "--attention flex"; do
        name=${model}_${pixels}_${flags#* }
        bench "train_$name" 300 train $flags --model "$model" --img_size "$pixels" --batch_size "$batch"
    done
done
run train_all_gpus 360 "$python" scripts/cli/agent.py --nnodes 1 --nproc_per_node auto -- \
    benchmarks/bench_train.py --bf16 --output_file "$out/gpu_train_all_gpus.json"
run fashion 590 bash scripts/fashion_mnist_16x16.sh data/fashion_mnist "$out/gpu_fashion"
exit "$failed"
