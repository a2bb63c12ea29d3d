#!/usr/bin/env bash
# The job of the tests: a short training with the functions of the published recipes.
#   CACHED_PATH=... OUTPUT_DIR=... bash tests/faults/slurm/train.sh [flags of main_lpd.py]
# PROGRAM: launched in place of main_lpd.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/common.sh"

require_path CACHED_PATH "the token cache that main_cache.py made"
set_processes
MAX_BATCH_PER_GPU=12
set_batch 12
launch --model lpd_tiny --use_cached --cached_path "$CACHED_PATH" --output_dir "$OUTPUT_DIR" --device cpu \
    --batch_size "$batch_size" --accum_iter "$accum_iter" --lr 1e-3 --lr_schedule constant --warmup_epochs 0 \
    --val_fraction 0 --log_every 1 --save_last_freq 0.2 "$@"
