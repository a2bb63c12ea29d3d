#!/usr/bin/env bash
# LPD-L at 512 px in 48 steps; published: FID 2.54, IS 292.2.
#   bash scripts/eval/lpd_l_res512_steps48.sh [flags of main_lpd.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

eval_lpd res512_steps48_repulsion4 --model lpd_l_512 --img_size 512 \
    --generation_steps 48 --cfg 7.3 "$@"
