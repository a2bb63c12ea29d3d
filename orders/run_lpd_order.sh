#!/usr/bin/env bash
# The order files of the paper, under their published names, as .json and as .npy.
# Flags are passed on: `orders/run_lpd_order.sh --num_runs 10`, `--overwrite`, `--seed 1`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3

write() { # image size, steps, repulsion threshold, flags
    local name=orders/lpd_orders_generated/res$1_steps$2_repulsion$3
    "$python" orders/run_lpd_order.py --img_size "$1" --generation_steps "$2" --repulsion_threshold "$3" \
        --output_file "$name.json" "$name.npy" "${@:4}"
}

write 256 20 2 "$@" # LPD-L and LPD-XL
write 256 20 3 "$@" # LPD-XXL
write 256 32 2 "$@"
write 512 48 4 "$@"
