# Where a run takes place, said in this one place: which Python, which machines, how many processes. `source` it
# (scripts/common.sh does); it sets repo and python, and set_processes sets the rest.
#
# One machine by default, on all of its GPUs. Several: NNODES, NODE_RANK and MASTER_ADDR on each of them, as
# scripts/cli/run.py gives them; in an `srun` of one's own they are SLURM's. NGPU: processes per machine.
# SLURM's programs are called in a job step of SLURM's only.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The Python that environment_setup.sh made in .venv; where there is none, that of the active environment.
python=$repo/.venv/bin/python
[[ -x $python ]] || python=python3

from_slurm() { # in a job step, what is not set yet: one task per machine
    [[ -n ${SLURM_STEP_ID:-} && -z ${NNODES:-} ]] || return 0
    ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) || usage_error \
        "srun started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES machines: --ntasks-per-node=1 is needed"
    NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
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
    NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
    if [[ -z ${NGPU:-} ]]; then
        NGPU=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))') ||
            usage_error "NGPU is not set and $python cannot count the GPUs"
    fi
    require_count NGPU
    ((NGPU == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun would, with a warning
}
