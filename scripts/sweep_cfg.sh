#!/usr/bin/env bash
# FID and IS over a list of guidance scales on 10,000 images each, then the best one on 50,000: a table, a CSV
# and a plot in OUTPUT_DIR. Run it again to resume.
#   OUTPUT_DIR=... bash scripts/sweep_cfg.sh [flags of main_lpd.py]
# LPD-L at 256 px in 20 steps by default; for another model give its flags (--model lpd_xl_256 --generation_steps 32)
# and LPD_ORDER_FILE, for other weights PRETRAINED_CKPT, for other statistics FID_STATS. CFGS: the scales.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read -ra scales <<<"${CFGS:-3 3.5 4 4.5 5 5.5 6}"
((${#scales[@]} > 1)) || usage_error "CFGS=$CFGS: name two guidance scales or more"
sweep=(--cfg "${scales[@]}" --final_images 50000)
eval_lpd res256_steps20_repulsion2 --model lpd_l_256 --img_size 256 --generation_steps 20 --num_images 10000 "$@"
