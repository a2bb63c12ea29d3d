# Shared by the scripts of this folder: `source` it. It checks the environment variables, finds Python and the
# machines, and starts main_lpd.py under torchrun; the numbers of each experiment are in its own script.
#
# One machine by default, on all of its GPUs. Several: NNODES, NODE_RANK and MASTER_ADDR on each of them, as
# scripts/cli/run.py sets them; in an `srun` of your own they are SLURM's. NGPU: processes per machine.
# MAX_BATCH_PER_GPU: larger batches are accumulated from smaller ones; the default of each training script fits a
# GPU of 80 GB (benchmarks/without_gpu/count_training.py).
# DRY_RUN=1: check, print the command and stop.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$repo/.venv/bin/python # made by environment_setup.sh; otherwise the active environment's
[[ -x $python ]] || python=python3

usage_error() {
    echo "error: $*" >&2
    exit 2
}
pwd -P >/dev/null 2>&1 || usage_error "the working directory is deleted: cd to one that exists"

require_set() { # require_set NAME WHAT: the variable is set
    [[ -n ${!1:-} ]] || usage_error "$1 is not set: $2"
}

require_path() { # require_path NAME WHAT: the variable is a path that exists, or a name on the hub
    require_set "$1" "$2"
    [[ -e ${!1} || ${!1} == hf://* ]] || usage_error "$1: ${!1} does not exist: $2"
}

require_count() { # require_count NAME: the variable is a whole number from 1
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || usage_error "$1=${!1} is not a whole number of at least 1"
}

require_tokenizer() { # VQGAN_PATH, else the file in tokenizers/, else the hub's
    local file=vq_ds16_c2i.pt
    if [[ -z ${VQGAN_PATH:-} ]]; then
        VQGAN_PATH=$repo/tokenizers/$file
        [[ -e $VQGAN_PATH ]] || VQGAN_PATH=hf://FoundationVision/LlamaGen/$file
    fi
    require_path VQGAN_PATH "the VQ tokenizer's weights, see tokenizers/README.md"
}

require_orders() { # require_orders NAME: LPD_ORDER_FILE, else the file made here, the hub's, or one made now
    local made=$repo/orders/lpd_orders_generated/$1.json hub=hf://mit-han-lab/lpd_orders/$1.json
    if [[ -z ${LPD_ORDER_FILE:-} ]]; then
        [[ -e $made || ${DRY_RUN:-0} != 0 ]] || "$python" "$repo/scripts/fetch.py" "$hub" ||
            bash "$repo/orders/run_lpd_order.sh"
        LPD_ORDER_FILE=$hub
        [[ ! -e $made ]] || LPD_ORDER_FILE=$made
    fi
    require_path LPD_ORDER_FILE "the generation orders, made by orders/run_lpd_order.sh"
}

from_slurm() { # in a job step of your own: one task per machine; variables that are set win
    [[ -n ${SLURM_STEP_ID:-} && -z ${NNODES:-} ]] || return 0
    ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) || usage_error \
        "srun started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES machines: --ntasks-per-node=1 is needed"
    NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID
    ((NNODES > 1)) || return 0
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1) ||
            usage_error "scontrol does not name the machines of $SLURM_STEP_NODELIST: set MASTER_ADDR to the first"
    fi
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
}

set_processes() { # sets NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NGPU
    from_slurm
    NNODES=${NNODES:-1}
    require_count NNODES
    if ((NNODES > 1)); then
        require_set MASTER_ADDR "with NNODES=$NNODES, the address of the first machine"
        require_set NODE_RANK "with NNODES=$NNODES, this machine's number from 0"
    fi
    export NNODES NODE_RANK=${NODE_RANK:-0} # for scripts/sweep.py
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
    if [[ -z ${NGPU:-} ]]; then
        NGPU=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))') ||
            usage_error "NGPU is not set and $python cannot count the GPUs"
    fi
    require_count NGPU
    ((NGPU == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun does the same, with a warning
}

set_batch() { # set_batch GLOBAL: sets batch_size (per GPU) and accum_iter so that GPUs x both is GLOBAL
    local gpus=$((NGPU * NNODES)) per_gpu
    per_gpu=$(($1 / gpus))
    ((per_gpu * gpus == $1)) || usage_error "NGPU x NNODES = $gpus does not divide the global batch of $1"
    require_count MAX_BATCH_PER_GPU
    accum_iter=1
    while ((per_gpu % accum_iter || per_gpu / accum_iter > MAX_BATCH_PER_GPU)); do accum_iter=$((accum_iter + 1)); done
    batch_size=$((per_gpu / accum_iter))
}

launch() { # launch FLAGS...: main_lpd.py (or PROGRAM) under torchrun; with the array `sweep`, under sweep.py
    local command=(
        "$python" "$repo/scripts/cli/agent.py"
        --nproc_per_node "$NGPU" --nnodes "$NNODES" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
        "${PROGRAM:-$repo/main_lpd.py}" "$@"
    )
    if [[ -n ${sweep:-} ]]; then command=("$python" "$repo/scripts/sweep.py" "${sweep[@]}" -- "${command[@]}"); fi
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "${command[@]}"
        echo
        exit
    fi
    exec "${command[@]}"
}

train_lpd() { # train_lpd GLOBAL_BATCH MOST FLAGS...: what all published training runs share, then FLAGS
    local global_batch=$1
    MAX_BATCH_PER_GPU=${MAX_BATCH_PER_GPU:-$2}
    shift 2
    require_path CACHED_PATH "the token cache that main_cache.py made"
    require_tokenizer
    require_set OUTPUT_DIR "the folder for checkpoints and logs"
    set_processes
    set_batch "$global_batch"
    launch --use_cached --cached_path "$CACHED_PATH" --vqgan_path "$VQGAN_PATH" \
        --output_dir "$OUTPUT_DIR" \
        --device cuda --val_fraction 0 --batch_size "$batch_size" --accum_iter "$accum_iter" --blr 1e-4 --min_lr 1e-5 \
        --weight_decay 0.02 --grad_clip 3.0 --label_drop_prob 0.1 --bf16 "$@"
}

eval_lpd() { # eval_lpd ORDERS FLAGS...: FID and IS of 50,000 images made with the order file named ORDERS
    local resolution=${1%%_*} orders=$1
    FID_STATS=${FID_STATS:-$repo/fid_stats/adm_in${resolution#res}_stats.npz}
    OUTPUT_DIR=${OUTPUT_DIR:-output/eval/$(basename "$0" .sh)} # where this program is called
    shift
    [[ -z ${PRETRAINED_CKPT:-} ]] || require_path PRETRAINED_CKPT "the trained weights (.pth, .safetensors or a run folder)"
    require_path FID_STATS "reference statistics, from the published repository or made by main_stats.py"
    require_tokenizer
    require_orders "$orders"
    set_processes
    [[ ${DRY_RUN:-0} != 0 ]] || echo "$VQGAN_PATH, $LPD_ORDER_FILE, $FID_STATS -> $OUTPUT_DIR"
    launch --evaluate ${PRETRAINED_CKPT:+--pretrained_ckpt "$PRETRAINED_CKPT"} --vqgan_path "$VQGAN_PATH" \
        --fid_stats "$FID_STATS" --output_dir "$OUTPUT_DIR" --lpd_order_file "$LPD_ORDER_FILE" \
        --device cuda --num_images 50000 --eval_bsz 64 --cfg_schedule linear --temperature 1.0 --bf16 "$@"
}
