#!/usr/bin/env bash
# Fashion-MNIST as 16x16 tokens, the grid of the published 256 px models: tokenizer, token cache, LPD.
# Run it again to resume.
#   bash scripts/fashion_mnist_16x16.sh DATA OUTPUT
# DATA: the images (made if they are missing). TOKENIZER_EPOCHS, LPD_EPOCHS, LPD_MODEL: shorter or longer runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# == 2 ]] || usage_error "usage: fashion_mnist_16x16.sh DATA OUTPUT"
data=$1 output=$2

[[ -d $data/train && -d $data/val ]] || bash "$repo/scripts/data/fashion_mnist.sh" "$data"

# 32x32 pixels -> 16x16 tokens of 256 codes
"$python" "$repo/main_tokenizer.py" --data_path "$data" --img_size 32 \
    --vocab_size 256 --base_width 32 --multipliers 1 1 --num_res_blocks 1 --z_channels 64 \
    --epochs "${TOKENIZER_EPOCHS:-0.25}" --batch_size 32 --num_workers 1 \
    --output_dir "$output/tokenizer"

"$python" "$repo/main_cache.py" --img_size 32 --vqgan_path "$output/tokenizer/tokenizer.safetensors" \
    --data_path "$data" --cached_path "$output/cache" --num_workers 1

"$python" "$repo/main_lpd.py" --model "${LPD_MODEL:-lpd_micro}" --use_cached --cached_path "$output/cache" \
    --vqgan_path "$output/tokenizer/tokenizer.safetensors" \
    --epochs "${LPD_EPOCHS:-1}" --batch_size 64 --lr 1.5e-3 --lr_schedule cosine --warmup_epochs 0.05 \
    --proj_dropout 0 --bf16 --save_last_freq 0.05 --sample_freq 0.5 --cfg 3 --output_dir "$output/lpd"
