#!/usr/bin/env bash
# A SLURM cluster of one node on the loopback interface, from Debian 12 packages. Needs root.
# It takes no systemd and no cgroups: memory is watched by polling. With `accounting` it has a
# database of jobs (slurmdbd on a MariaDB of its own), and jobs of an unknown account are refused.
#
# Usage: cluster.sh up [accounting] | down
set -euo pipefail

CONFIG=/etc/slurm/slurm.conf
RUN=/run/terraloom-slurm
SOCKET=/run/mysqld/mysqld.sock # where its client library looks
ACCOUNTING=${2:-}

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
    local wanted=(slurmctld slurmd slurm-client munge) programs=(slurmctld slurmd sbatch munged)
    if [[ $ACCOUNTING ]]; then
        wanted+=(slurmdbd mariadb-server)
        programs+=(slurmdbd mariadbd)
    fi
    [[ $(command -v "${programs[@]}" | wc -l) -eq ${#programs[@]} ]] && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        "${wanted[@]}" >/dev/null
}

accounting() {
    if [[ $ACCOUNTING ]]; then
        # squeue forgets finished jobs at once: who does not ask sacct never sees them end.
        printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd \
            AccountingStorageHost=127.0.0.1 AccountingStorageEnforce=associations MinJobAge=2
    else
        # Finished jobs are seen in squeue for so long.
        printf '%s\n' AccountingStorageType=accounting_storage/none MinJobAge=600
    fi
}

# The database, its daemon, and an account that root may use.
start_accounting() {
    mkdir -p "$RUN" /run/mysqld
    [[ -d $RUN/mysql ]] || mariadb-install-db --user=root --datadir="$RUN/mysql" \
        --auth-root-authentication-method=socket --skip-test-db >/dev/null
    alive mariadbd || mariadbd --no-defaults --user=root --datadir="$RUN/mysql" --socket="$SOCKET" \
        --pid-file="$RUN/mariadbd.pid" --skip-networking --innodb-lock-wait-timeout=900 \
        >"$RUN/mariadbd.log" 2>&1 &
    wait_for mariadb-admin --no-defaults --socket="$SOCKET" ping
    cat >/etc/slurm/slurmdbd.conf <<C
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
PidFile=$RUN/slurmdbd.pid
LogFile=$RUN/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
C
    chmod 0600 /etc/slurm/slurmdbd.conf
    alive slurmdbd || slurmdbd
    wait_for sacctmgr -n show cluster
    sacctmgr -i add cluster terraloom >/dev/null || true # there from the last time
    sacctmgr -i add account maps >/dev/null || true
    sacctmgr -i add user root account=maps >/dev/null || true
}

wait_for() {
    for _ in {1..120}; do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.5
    done
    echo "no answer from: $*" >&2
    tail -n 20 "$RUN"/*.log >&2
    return 1
}

configuration() {
    local node cores memory
    node=$(hostname -s)
    cores=$(nproc --all) # not of OMP_NUM_THREADS
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
$(accounting)
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
        rm -rf "$RUN/state" && mkdir "$RUN/state" # of another kind of cluster
        configuration >"$CONFIG"
    fi
    if ! unmunge </dev/null >/dev/null 2>&1 && ! munge -n >/dev/null 2>&1; then
        runuser -u munge -- /usr/sbin/munged --force
    fi
    [[ -z $ACCOUNTING ]] || start_accounting
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
    stop slurmdbd
    stop mariadbd
    # The daemon of munge stays: it may belong to others.
}

case ${1:-} in
    up | down) "$1" ;;
    *) echo "usage: $0 up [accounting] | down" >&2; exit 2 ;;
esac
