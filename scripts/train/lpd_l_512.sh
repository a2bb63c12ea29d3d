#!/usr/bin/env bash
# LPD-L at 512 px: 50 epochs from the 256 px weights, 2048 images a step as there.
#   CACHED_PATH=... PRETRAINED_CKPT=... OUTPUT_DIR=... bash scripts/train/lpd_l_512.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

require_path PRETRAINED_CKPT "the weights of lpd_l at 256 px to start from"
train_lpd 2048 16 --model lpd_l --img_size 512 --epochs 50 --lr_schedule cosine --warmup_epochs 1 \
    --pretrained_ckpt "$PRETRAINED_CKPT" "$@"
