#!/usr/bin/env bash
# LPD-XL at 512 px: 50 epochs from the 256 px weights, 1024 images a step as there.
#   CACHED_PATH=... PRETRAINED_CKPT=... OUTPUT_DIR=... bash scripts/train/lpd_xl_512.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

require_path PRETRAINED_CKPT "the weights of lpd_xl at 256 px to start from"
train_lpd 1024 8 --model lpd_xl --img_size 512 --epochs 50 --lr_schedule cosine --warmup_epochs 1 \
    --pretrained_ckpt "$PRETRAINED_CKPT" "$@"
