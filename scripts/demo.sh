#!/usr/bin/env bash
# Sets up, then generates Fashion-MNIST images with the weights in assets/, in 8 steps and one token at a
# time, and prints where the pictures are. Runs from any folder and needs no GPU.
#   bash scripts/demo.sh            about a minute after set-up
#   bash scripts/demo.sh --train    trains its own small weights first: half an hour on two cores; longer or
#                                   shorter with TOKENIZER_EPOCHS and LPD_EPOCHS
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train=0
if [[ ${1:-} == --train ]]; then
    train=1
    shift
fi

bash "$repo/environment_setup.sh"
python=$repo/.venv/bin/python

lpd=$repo/assets/fashion_mnist/lpd.safetensors
if [[ $train == 1 ]]; then
    work=$repo/output/demo_train
    TOKENIZER_EPOCHS=${TOKENIZER_EPOCHS:-0.5} LPD_EPOCHS=${LPD_EPOCHS:-2} \
        bash "$repo/scripts/fashion_mnist.sh" "$work"
    lpd=$work/lpd/lpd.safetensors
fi

"$python" "$repo/main_sample.py" --pretrained_ckpt "$lpd" --num_per_class 8 \
    --generation_steps 8 --compare_steps 64 --cfg 4 --output_dir "$repo/output/demo" --overwrite "$@"
