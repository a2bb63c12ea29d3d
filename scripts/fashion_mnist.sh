#!/usr/bin/env bash
# From nothing to images on Fashion-MNIST, through the real programs: data, tokenizer, token cache, LPD.
# This made the weights in assets/fashion_mnist. Run it again to resume.
#   bash scripts/fashion_mnist.sh OUTPUT_DIR
# TOKENIZER_EPOCHS, LPD_EPOCHS: shorter training. DATA_PATH: the images (made if they are missing).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# == 1 ]] || usage_error "usage: fashion_mnist.sh OUTPUT_DIR"
output=$1
data=${DATA_PATH:-$repo/data/fashion_mnist}

bash "$repo/scripts/data/fashion_mnist.sh" "$data"

# 32x32 pixels -> 8x8 tokens of 512 codes
"$python" "$repo/main_tokenizer.py" --data_path "$data" --img_size 32 \
    --vocab_size 512 --base_width 32 --multipliers 1 2 2 --num_res_blocks 1 --z_channels 64 \
    --epochs "${TOKENIZER_EPOCHS:-2}" --batch_size 64 --bf16 --num_workers 1 \
    --output_dir "$output/tokenizer"

"$python" "$repo/main_cache.py" --img_size 32 --vqgan_path "$output/tokenizer/tokenizer.safetensors" \
    --data_path "$data" --cached_path "$output/cache" --num_workers 1

"$python" "$repo/main_lpd.py" --model lpd_tiny --use_cached --cached_path "$output/cache" \
    --vqgan_path "$output/tokenizer/tokenizer.safetensors" \
    --epochs "${LPD_EPOCHS:-6}" --batch_size 64 --lr 1.5e-3 --lr_schedule cosine --warmup_epochs 0.2 \
    --proj_dropout 0 --bf16 --sample_freq 1 --cfg 3 --output_dir "$output/lpd"
