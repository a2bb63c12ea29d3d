#!/usr/bin/env bash
# FID and IS over a list of guidance scales on 10,000 images each, then the best one on 50,000: a table, a CSV
# and a plot in OUTPUT_DIR. Killed and started again it goes on.
#   PRETRAINED_CKPT=... FID_STATS=... OUTPUT_DIR=... bash scripts/sweep_cfg.sh [flags of main_lpd.py]
# As it is, LPD-L at 256 px in 20 steps. Another model: its flags (--model lpd_xl --generation_steps 32) and
# LPD_ORDER_FILE. CFGS: the scales.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read -ra scales <<<"${CFGS:-3 3.5 4 4.5 5 5.5 6}"
((${#scales[@]} > 1)) || usage_error "CFGS=$CFGS: name two guidance scales or more"
eval_lpd res256_steps20_repulsion2 --model lpd_l --img_size 256 --generation_steps 20 \
    --sweep_cfg "${scales[@]}" --num_images 10000 --final_images 50000 "$@"
