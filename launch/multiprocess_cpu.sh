#!/usr/bin/env bash
# Trains in several processes on the CPU of this machine, as a cluster does; this is what tests run.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/multiprocess_cpu.sh --processes N [--devices-per-process K] [--grace SECONDS]
           --config FILE --workdir DIR [--config.KEY=VALUE ...]

Runs N processes of one training, each with K CPU devices (1), and prefixes their output with
[number]. SIGTERM and SIGINT go to all of them. Once one has failed, the others have --grace seconds
(60) to notice by themselves and to name it; then they get SIGTERM and, as much later, SIGKILL. The
exit status is 0 if all end with 0, else that of the first that did not, so 143 if all were stopped.
Every further argument goes to python -m ccl_jax.main.

  PYTHON   the interpreter; without it that of the project's .venv, else python3

Example: launch/multiprocess_cpu.sh --processes 2 --config configs/demo.py --workdir runs/demo
TEXT
}

processes= devices=1 grace=60
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --processes) processes=${2:-} ;;
    --devices-per-process) devices=${2:-} ;;
    --grace) grace=${2:-} ;;
    *) break ;;
  esac
  shift $(($# > 1 ? 2 : 1))
done
if [[ ! $processes =~ ^[1-9][0-9]*$ || ! $devices =~ ^[1-9][0-9]*$ || ! $grace =~ ^[0-9]+$ ]]; then
  usage >&2
  exit 2
fi

venv=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
if [[ ! -x $venv ]]; then
  venv=python3
fi
python=${PYTHON:-$venv}
port=$(python3 -c 'import socket; s = socket.create_server(("localhost", 0)); print(s.getsockname()[1])')

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes

# Job control gives every process a group of its own: Ctrl-C in a terminal then reaches only this
# script, which passes it on once; a second signal would end a training without saving.
set -m
pids=()
forward() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((number = 0; number < processes; number++)); do
  JAX_PROCESS_ID=$number "$python" -m ccl_jax.main --job train "$@" \
    > >(trap '' TERM INT; exec sed -u "s/^/[$number] /") 2>&1 &
  pids+=($!)
done

# Polled, because `wait -n` cannot tell a signal to this script from a process that it ended.
status=0 failed_at= told=
while [[ ${#pids[@]} -gt 0 ]]; do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if [[ $code -ne 0 && $status -eq 0 ]]; then
      status=$code failed_at=$SECONDS
    fi
  done
  pids=("${running[@]}")
  if [[ -n $failed_at && ${#pids[@]} -gt 0 ]]; then
    waited=$((SECONDS - failed_at))
    if [[ $waited -gt $((2 * grace)) ]]; then
      forward KILL
    elif [[ $waited -gt $grace && -z $told ]]; then
      forward TERM
      told=yes
    fi
  fi
  sleep 0.2 || true
done
exit "$status"
