#!/usr/bin/env bash
# A real SLURM cluster on this machine alone, for the tests: munged, slurmctld and slurmd, without systemd, cgroups
# or a database. All its files are in DIR; clients find it by SLURM_CONF=DIR/slurm.conf.
#   bash one_node.sh start DIR    installs SLURM if needed (root on Debian), starts, waits until the node is idle
#   bash one_node.sh stop DIR     cancels all jobs and ends the three daemons of DIR
# PORT: the first of two free ports (6817). Exit status 3: SLURM cannot be installed.
set -euo pipefail

[[ $# == 2 && $1 =~ ^(start|stop)$ ]] || { echo "usage: one_node.sh start|stop DIR" >&2; exit 2; }
dir=$(mkdir -p "$2" && cd "$2" && pwd)
port=${PORT:-6817}
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

stop() {
    if [[ -s $SLURM_CONF ]]; then scancel --user="$(id -un)" || true; fi
    local daemon pid
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$dir/$daemon.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        for ((i = 0; i < 100; i++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    done
}

missing() {
    local program
    for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || return 0; done
    return 1
}

install_slurm() {
    [[ $EUID == 0 ]] && command -v apt-get >/dev/null || { echo "no SLURM, and not root with apt-get" >&2; exit 3; }
    apt_get() { DEBIAN_FRONTEND=noninteractive timeout 120 apt-get -qq "$@" >"$dir/apt.log" 2>&1; }
    apt_get update || true # a stale list may suffice
    apt_get install -y --no-install-recommends dataset-fashion-mnist munge slurmctld slurmd slurm-client ||
        { echo "no SLURM, and apt-get cannot install it: $(tail -n 1 "$dir/apt.log")" >&2; exit 3; }
}

configure() {
    local me
    me=$(id -un)
    mkdir -p "$dir/state" "$dir/spool"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    cat >"$SLURM_CONF" <<END
ClusterName=lpd-test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf" # slurmd 22.05 loads it even if nothing uses it
}

if [[ $1 == stop ]]; then
    stop
    exit
fi
if missing; then install_slurm; fi
configure
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
slurmctld -c
slurmd
for ((i = 0; i < 150; i++)); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) != idle ]] || exit 0
    sleep 0.2
done
echo "the node is not idle after 30 s: $(tail -n 3 "$dir"/*.log)" >&2
stop
exit 1
