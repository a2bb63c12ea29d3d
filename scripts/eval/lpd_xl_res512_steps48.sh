#!/usr/bin/env bash
# LPD-XL at 512 px in 48 steps; published: FID 2.10, IS 326.0.
#   bash scripts/eval/lpd_xl_res512_steps48.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

eval_lpd res512_steps48_repulsion4 --model lpd_xl_512 --img_size 512 \
    --generation_steps 48 --cfg 6.0 "$@"
