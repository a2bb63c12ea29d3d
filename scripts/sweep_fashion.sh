#!/usr/bin/env bash
# Orders against numbers of steps on Fashion-MNIST with the shipped weights, the paper's figure 9b at a small
# scale: Frechet distance on EfficientNet-Lite0 features (not FID) of 2,000 images and three seeds a point.
#   OUTPUT_DIR=... bash scripts/sweep_fashion.sh [flags of main_lpd.py]
# Makes the data and the reference statistics (of the 10,000 held-out images) if they are missing. Run it again
# to resume. Needs requirements-dev.txt. PRETRAINED_CKPT, VQGAN_PATH: other weights. DATA_PATH: the images.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PRETRAINED_CKPT=${PRETRAINED_CKPT:-$repo/assets/fashion_mnist/lpd.safetensors}
VQGAN_PATH=${VQGAN_PATH:-$repo/assets/fashion_mnist/tokenizer.safetensors}
require_path PRETRAINED_CKPT "the trained weights"
require_path VQGAN_PATH "the tokenizer's weights"
require_set OUTPUT_DIR "the folder for the results"
set_processes

data=${DATA_PATH:-$repo/data/fashion_mnist}
reference=$OUTPUT_DIR/fashion_mnist_val.npz
if [[ ${DRY_RUN:-0} == 0 && ! -e $reference ]]; then
    bash "$repo/scripts/data/fashion_mnist.sh" "$data"
    "$python" "$repo/main_stats.py" --data_path "$data/val" --val_fraction 0 --img_size 32 --features efficientnet_lite0 \
        --num_workers 1 --output_file "$reference"
fi
sweep=(--orders lpd halton random raster --steps 4 8 16 32 --seeds 0 1 2)
launch --evaluate --pretrained_ckpt "$PRETRAINED_CKPT" --vqgan_path "$VQGAN_PATH" \
    --fid_stats "$reference" --features efficientnet_lite0 --output_dir "$OUTPUT_DIR" \
    --num_images 2000 --eval_bsz 20 --cfg 3 "$@"
