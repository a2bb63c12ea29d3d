#!/usr/bin/env bash
# LPD-XL at 256 px in 32 steps; published: FID 1.92, IS 319.4.
#   bash scripts/eval/lpd_xl_res256_steps32.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

eval_lpd res256_steps32_repulsion2 --model lpd_xl_256 --img_size 256 \
    --generation_steps 32 --cfg 5.0 "$@"
