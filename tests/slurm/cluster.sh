#!/usr/bin/env bash
# A SLURM cluster of one node on the loopback interface, from Debian 12 packages. Needs root.
# It takes no database, no systemd and no cgroups: memory is watched by polling.
#
# Usage: cluster.sh up | down
set -euo pipefail

CONFIG=/etc/slurm/slurm.conf
RUN=/run/terraloom-slurm

alive() {
    [[ -s $RUN/$1.pid ]] && kill -0 "$(<"$RUN/$1.pid")" 2>/dev/null
}

stop() {
    alive "$1" || return 0
    local pid
    pid=$(<"$RUN/$1.pid")
    kill "$pid"
    timeout 10 bash -c "while kill -0 $pid 2>/dev/null; do sleep 0.1; done" || kill -9 "$pid"
}

install_packages() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
}

configuration() {
    local node cores memory
    node=$(hostname -s)
    cores=$(nproc)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.7)}' /proc/meminfo)
    cat <<C
ClusterName=terraloom
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$RUN/slurmctld.log
SlurmdLogFile=$RUN/slurmd.log
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
# A step above its memory is killed within about a second.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=2
# No accounting: finished jobs are seen in squeue for so long.
AccountingStorageType=accounting_storage/none
MinJobAge=600
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores SocketsPerBoard=1 CoresPerSocket=$cores RealMemory=$memory
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
C
}

up() {
    install_packages
    mkdir -p /etc/slurm "$RUN/state" "$RUN/spool" /run/munge /var/lib/munge /var/log/munge /etc/munge
    if [[ ! -s /etc/munge/munge.key ]]; then
        head -c 1024 /dev/urandom >/etc/munge/munge.key
    fi
    chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
    chmod 0700 /etc/munge
    chmod 0400 /etc/munge/munge.key
    chmod 0755 /run/munge
    if ! diff -q <(configuration) "$CONFIG" >/dev/null 2>&1; then
        stop slurmd
        stop slurmctld
        configuration >"$CONFIG"
    fi
    if ! unmunge </dev/null >/dev/null 2>&1 && ! munge -n >/dev/null 2>&1; then
        runuser -u munge -- /usr/sbin/munged --force
    fi
    alive slurmctld || slurmctld
    alive slurmd || slurmd
    for _ in {1..60}; do
        case $(sinfo -h -o %T 2>/dev/null) in
            idle* | mixed* | allocated*) return 0 ;;
            down* | drain*) scontrol update NodeName="$(hostname -s)" State=RESUME || true ;;
        esac
        sleep 0.5
    done
    echo "SLURM did not start:" >&2
    tail -n 20 "$RUN"/*.log >&2
    return 1
}

down() {
    scancel --user=root 2>/dev/null || true
    stop slurmd
    stop slurmctld
    # The daemon of munge stays: it may belong to others.
}

case ${1:-} in
    up | down) "$1" ;;
    *) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
