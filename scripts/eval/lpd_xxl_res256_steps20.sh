#!/usr/bin/env bash
# LPD-XXL at 256 px in 20 steps; published: FID 2.00, IS 337.6.
#   bash scripts/eval/lpd_xxl_res256_steps20.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

eval_lpd res256_steps20_repulsion3 --model lpd_xxl_256 --img_size 256 \
    --generation_steps 20 --cfg 5.9 "$@"
