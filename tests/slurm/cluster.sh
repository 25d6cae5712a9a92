#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, for tests: no systemd, no cgroups, nothing outside DIR.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tests/slurm/cluster.sh up DIR | down DIR

up    starts munged, slurmctld and slurmd with all their state in DIR, waits for the node, and
      prints the line that lets this shell's sbatch, squeue and so on use it
down  cancels all jobs, then ends the daemons by the process ids that they wrote into DIR; the logs
      stay

Needs root, and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge).
CPUS=N offers N of them, true or not; without it as many as there are.
TEXT
}

# Prints so many ports of 127.0.0.1 that are free now.
free_ports() {
  python3 - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

# linuxproc and task/none do without cgroups, which a container may not have; nothing is confined.
# cred_expire is also how long a requeued job waits: two minutes by default.
write_conf() {
  local controller=$1 daemon=$2
  cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$daemon
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
  trap down EXIT # unless all of them are there
  mkdir -p "$dir"/{munge,state,spool}
  dir=$(cd "$dir" && pwd -P)
  read -r controller daemon < <(free_ports 2)
  write_conf "$controller" "$daemon"
  mungekey --create --keyfile="$dir/munge/key"
  # Forced, because munged wants its socket in a folder that everybody may enter; all are root here.
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge/seed"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  for _ in {1..120}; do
    if [[ $(sinfo --noheader --format=%T) == idle ]]; then
      trap - EXIT
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.5
  done
  echo "The node is not idle after a minute; see $dir/*.log." >&2
  exit 1
}

down() {
  local daemon pid
  export SLURM_CONF=$dir/slurm.conf
  # slurmd leaves the jobs running when it ends.
  if [[ -f $dir/slurmctld.pid ]]; then
    squeue --noheader --format=%i | xargs --no-run-if-empty scancel || true
    for _ in {1..100}; do
      if [[ -z $(squeue --noheader) ]]; then
        break
      fi
      sleep 0.2
    done
  fi
  for daemon in slurmd slurmctld munged; do
    if [[ ! -f $dir/$daemon.pid ]]; then
      continue
    fi
    pid=$(<"$dir/$daemon.pid")
    # A number may have passed on to another program since.
    if [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$daemon" ]]; then
      kill "$pid"
      tail --pid="$pid" --follow --lines=0 /dev/null
    fi
    rm -f "$dir/$daemon.pid"
  done
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
if [[ $# -ne 2 || ($1 != up && $1 != down) ]]; then
  usage >&2
  exit 2
fi
dir=$2
cpus=${CPUS:-$(nproc)}
"$1"
