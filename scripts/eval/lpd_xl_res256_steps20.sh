#!/usr/bin/env bash
# LPD-XL at 256 px in 20 steps; published: FID 2.10, IS 326.7.
#   bash scripts/eval/lpd_xl_res256_steps20.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

eval_lpd res256_steps20_repulsion2 --model lpd_xl_256 --img_size 256 \
    --generation_steps 20 --cfg 4.9 "$@"
