# Shared by the scripts of this folder: `source` it. Knows how to check what the environment must name, and
# start main_lpd.py under torchrun; the numbers of each experiment are in the scripts, Python and the machines
# in setups/environment.sh.
#
# MAX_BATCH_PER_GPU: split larger batches into accumulated ones.
# DRY_RUN=1: check, print the command and stop.

usage_error() {
    echo "error: $*" >&2
    exit 2
}

source "$(dirname "${BASH_SOURCE[0]}")/setups/environment.sh"

require_set() { # require_set NAME WHAT: the environment names it
    [[ -n ${!1:-} ]] || usage_error "$1 is not set: $2"
}

require_path() { # require_path NAME WHAT: the environment names it and it exists, or is a name on the hub
    require_set "$1" "$2"
    [[ -e ${!1} || ${!1} == hf://* ]] || usage_error "$1: ${!1} does not exist: $2"
}

require_count() { # require_count NAME: a whole number from 1
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || usage_error "$1=${!1} is not a whole number of at least 1"
}

set_batch() { # set_batch GLOBAL: sets batch_size (per GPU) and accum_iter so that their product is GLOBAL
    local gpus=$((NGPU * NNODES)) per_gpu
    per_gpu=$(($1 / gpus))
    ((per_gpu * gpus == $1)) || usage_error "NGPU x NNODES = $gpus does not divide the global batch of $1"
    MAX_BATCH_PER_GPU=${MAX_BATCH_PER_GPU:-$per_gpu}
    require_count MAX_BATCH_PER_GPU
    accum_iter=1
    while ((per_gpu % accum_iter || per_gpu / accum_iter > MAX_BATCH_PER_GPU)); do accum_iter=$((accum_iter + 1)); done
    batch_size=$((per_gpu / accum_iter))
}

launch() { # launch FLAGS...: main_lpd.py (or PROGRAM) under torchrun
    local command=(
        "$python" "$repo/scripts/cli/agent.py"
        --nproc_per_node "$NGPU" --nnodes "$NNODES" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
        "${PROGRAM:-$repo/main_lpd.py}" "$@"
    )
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "${command[@]}"
        echo
        exit
    fi
    exec "${command[@]}"
}

require_tokenizer() {
    VQGAN_PATH=${VQGAN_PATH:-$repo/tokenizers/vq_ds16_c2i.pt}
    require_path VQGAN_PATH "the VQ tokenizer's weights, see tokenizers/README.md"
}

train_lpd() { # train_lpd GLOBAL_BATCH FLAGS...: what all published training runs share, then FLAGS
    local global_batch=$1
    shift
    require_path CACHED_PATH "the token cache that main_cache.py made"
    require_tokenizer
    require_set OUTPUT_DIR "the folder for checkpoints and logs"
    set_processes
    set_batch "$global_batch"
    launch --use_cached --cached_path "$CACHED_PATH" --vqgan_path "$VQGAN_PATH" \
        --output_dir "$OUTPUT_DIR" --resume "$OUTPUT_DIR" \
        --batch_size "$batch_size" --accum_iter "$accum_iter" --blr 1e-4 --min_lr 1e-5 \
        --weight_decay 0.02 --grad_clip 3.0 --label_drop_prob 0.1 --bf16 "$@"
}

eval_lpd() { # eval_lpd ORDERS FLAGS...: FID and IS of 50,000 images made with the order file named ORDERS
    LPD_ORDER_FILE=${LPD_ORDER_FILE:-$repo/orders/lpd_orders_generated/$1.json}
    shift
    require_path PRETRAINED_CKPT "the trained weights (.pth, .safetensors or a run folder)"
    require_path FID_STATS "the reference statistics of this image size, made by main_stats.py"
    require_set OUTPUT_DIR "the folder for the result"
    require_tokenizer
    require_path LPD_ORDER_FILE "the generation orders, made by orders/run_lpd_order.sh"
    set_processes
    launch --evaluate --pretrained_ckpt "$PRETRAINED_CKPT" --vqgan_path "$VQGAN_PATH" \
        --fid_stats "$FID_STATS" --output_dir "$OUTPUT_DIR" --lpd_order_file "$LPD_ORDER_FILE" \
        --num_images 50000 --eval_bsz 64 --cfg_schedule linear --temperature 1.0 --bf16 "$@"
}
