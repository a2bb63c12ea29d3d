#!/usr/bin/env bash
# LPD-XXL at 256 px: 450 epochs of 1024 images a step.
#   CACHED_PATH=... OUTPUT_DIR=... bash scripts/train/lpd_xxl_256.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train_lpd 1024 16 --model lpd_xxl --img_size 256 --epochs 450 \
    --lr_schedule constant+cosine --warmup_epochs 50 --lr_decay_start_epoch 400 "$@"
