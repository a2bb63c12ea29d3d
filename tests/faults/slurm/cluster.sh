#!/usr/bin/env bash
# A real SLURM cluster of N machines on this one, for the tests: each machine is a network namespace with a host name,
# an address, a cable and a slurmd of its own; munged and slurmctld run beside them, all without systemd, cgroups or
# a database. All its files are in DIR; clients find it by SLURM_CONF=DIR/slurm.conf.
#   bash cluster.sh start DIR N    installs SLURM if needed (Debian), starts, waits until the machines are idle
#   bash cluster.sh die DIR I      machine I loses its power: its cable is dead and all its processes end
#   bash cluster.sh cut DIR I      its cable is pulled: its processes go on, unreachable
#   bash cluster.sh back DIR I     it has power and cable again
#   bash cluster.sh hang DIR I JOB all processes of a job there are stopped (SIGSTOP), SLURM's own are not
#   bash cluster.sh stop DIR       ends all jobs and removes the machines
# Needs root. Exit status 3: there can be no cluster here, for the reason printed.
set -euo pipefail

[[ $# -ge 2 && $1 =~ ^(start|die|cut|back|hang|stop)$ ]] ||
    { echo "usage: cluster.sh start|die|cut|back|hang|stop DIR [N|I]" >&2; exit 2; }
verb=$1 dir=$(mkdir -p "$2" && cd "$2" && pwd) number=${3:-1}
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

impossible() {
    echo "$*" >&2
    exit 3
}

install_missing() {
    local program packages="dataset-fashion-mnist munge slurmctld slurmd slurm-client iproute2"
    [[ $EUID == 0 ]] || impossible "a cluster of several machines needs root"
    for program in munged slurmctld slurmd sbatch ip; do command -v $program >/dev/null || break; done
    if ! command -v $program >/dev/null; then
        command -v apt-get >/dev/null || impossible "no $program, and no apt-get to install it"
        apt_get() { DEBIAN_FRONTEND=noninteractive timeout 120 apt-get -qq "$@" >"$dir/apt.log" 2>&1; }
        apt_get update || true # a stale list may suffice
        apt_get install -y --no-install-recommends $packages ||
            impossible "no SLURM, and apt-get cannot install it: $(tail -n 1 "$dir/apt.log")"
    fi
}

choose_network() { # a bridge can be made once: its number makes names, addresses and ports unique
    local error
    for ((id = 1; id < 100; id++)); do
        if error=$(ip link add "lpd$id" type bridge 2>&1); then
            echo "$id" >"$dir/id"
            ip address add "10.213.$id.254/24" dev "lpd$id"
            ip link set "lpd$id" up
            return
        fi
        [[ $error == *"File exists"* ]] || break
    done
    impossible "no network for the machines: $error"
}

plug_in() { # a namespace for machine $1, cabled to the bridge
    local name=lpd$id-$1 other
    ip netns add "$name"
    ip link add "$name" type veth peer name eth0 netns "$name"
    ip link set "$name" master "lpd$id" up
    ip -n "$name" address add "10.213.$id.$1/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    mkdir -p "/etc/netns/$name"
    { cat /etc/hosts; for ((other = 1; other <= number; other++)); do echo "10.213.$id.$other lpd$other"; done; } \
        >"/etc/netns/$name/hosts"
}

boot() { ip netns exec "lpd$id-$1" unshare --uts bash -c "hostname lpd$1 && exec slurmd -N lpd$1"; }

processes() { ip netns pids "lpd$id-$1" 2>/dev/null || true; }

kill_all() {
    local pids
    while pids=$(processes "$1") && [[ -n $pids ]]; do kill -9 $pids 2>/dev/null || sleep 0.1; done
}

configure() {
    local port=$((6817 + 2 * id)) me machine
    me=$(id -un)
    mkdir -p "$dir/state"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf" # slurmd 22.05 loads it even if nothing uses it
    cat >"$SLURM_CONF" <<END
ClusterName=lpd$id
SlurmctldHost=$(hostname -s)(10.213.$id.254)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=${SLURMD_TIMEOUT:-6}
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=86400
END
    for ((machine = 1; machine <= number; machine++)); do
        echo "NodeName=lpd$machine NodeAddr=10.213.$id.$machine CPUs=8 State=UNKNOWN"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<END
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
END
}

start() {
    local machine
    install_missing
    choose_network
    configure
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    slurmctld -c
    for ((machine = 1; machine <= number; machine++)); do plug_in $machine && boot $machine; done
    for ((i = 0; i < 150; i++)); do
        [[ $(sinfo --noheader --Node --partition=test --states=idle 2>/dev/null | wc -l) != "$number" ]] || return 0
        sleep 0.2
    done
    echo "not all machines are idle after 30 s: $(tail -n 3 "$dir"/*.log)" >&2
    stop
    exit 1
}

stop() {
    local daemon name pid
    for name in $(ip netns list | grep -o "^lpd$id-[0-9]*"); do
        kill_all "${name#*-}"
        ip netns delete "$name"
        rm -r "/etc/netns/$name"
    done
    for daemon in slurmctld munged; do # slurmctld would wait for machines that are lost
        pid=$(cat "$dir/$daemon.pid" 2>/dev/null) && kill -9 "$pid" || true
    done
    ip link delete "lpd$id"
}

[[ $verb == start ]] || id=$(cat "$dir/id")
case $verb in
start) start ;;
die)
    ip link set "lpd$id-$number" down
    kill_all "$number"
    ;;
cut) ip link set "lpd$id-$number" down ;;
back)
    ip link set "lpd$id-$number" up
    if [[ -n $(processes "$number") ]]; then kill -HUP "$(cat "$dir/slurmd-lpd$number.pid")"; else boot "$number"; fi
    ;;
hang)
    for pid in $(processes "$number"); do
        if grep -qsz "^SLURM_JOB_ID=$4\$" "/proc/$pid/environ"; then kill -STOP "$pid"; fi
    done
    ;;
stop) stop ;;
esac
