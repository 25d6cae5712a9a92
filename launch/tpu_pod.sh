#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU pod slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh [--dry-run] [--install | --stop] --config FILE --workdir DIR [...]

Starts one process on every host of a TPU slice; JAX finds out the rest from the TPU's metadata.
Every further argument goes to python -m ccl_jax.main. The output of all hosts comes back here.

  --install   copies this folder to ~/ccl_jax on every host and installs it there; needed once
  --stop      sends SIGTERM to the processes: they save and end with 143
  --dry-run   prints the commands instead

A training continues at its last checkpoint when it is started again with the same workdir. That
has to be a folder that all hosts share, like the data (Filestore, or a bucket under gcsfuse), and
outlives the slice. Ctrl-C here cuts the connection, without which the processes end at their next
output, unsaved: use --stop, and start it under tmux or the like. A slice that was preempted is gone:
create it again, --install, and start again.

  TPU_NAME   name of the TPU VM
  ZONE       its zone
  PROJECT    its project
  PYTHON     for --install, the interpreter on the hosts, 3.11 or newer; without it python3

gcloud has to be installed and logged in.

Example:
  export TPU_NAME=ccl ZONE=us-east5-b PROJECT=mine
  launch/tpu_pod.sh --install
  launch/tpu_pod.sh --config configs/mvtec.py --workdir /mnt/shared/runs/mvtec
TEXT
}

run=() what=train
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) run=(show) ;;
    --install) what=install ;;
    --stop) what=stop ;;
    *) break ;;
  esac
  shift
done
if [[ $what == train && $# -eq 0 ]]; then
  usage >&2
  exit 2
fi
for name in TPU_NAME ZONE PROJECT; do
  if [[ -z ${!name:-} ]]; then
    echo "$name is not set; e.g. export TPU_NAME=ccl ZONE=us-east5-b PROJECT=mine" >&2
    exit 2
  fi
done

show() { printf '%q ' "$@" && echo; }
tpu=(gcloud compute tpus tpu-vm)
where=(--project="$PROJECT" --zone="$ZONE" --worker=all)
on_all() { "${run[@]}" "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" --command="$1"; }

# JAX does not recognise a host of Compute Engine by its environment: gcetpu lets it ask the metadata.
start='.venv/bin/python -m ccl_jax.main --job train --config.run.cluster=gcetpu'
case $what in
  install)
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    files=(pyproject.toml README.md LICENSE ccl_jax configs)
    on_all 'mkdir -p ccl_jax'
    "${run[@]}" "${tpu[@]}" scp --recurse "${files[@]/#/$folder/}" "$TPU_NAME:ccl_jax/" "${where[@]}"
    on_all "cd ccl_jax && ${PYTHON:-python3} -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    ;;
  train)
    # exec keeps the number of the shell's process.
    on_all "cd ccl_jax && echo \$\$ >train.pid && exec $start$(printf ' %q' "$@")"
    ;;
  stop)
    on_all 'kill -TERM "$(cat ccl_jax/train.pid)"'
    ;;
esac
