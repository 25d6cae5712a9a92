#!/usr/bin/env bash
# Trains on all devices of this host, in one process.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh --config FILE --workdir DIR [--config.KEY=VALUE ...]

Trains on all GPUs, TPU cores or, without any, the CPU of this host. Started again with the same
workdir it continues there. Every argument goes to python -m ccl_jax.main.

  PYTHON   the interpreter; without it that of the project's .venv, else python3

Example: launch/local.sh --config configs/demo.py --workdir runs/demo
TEXT
}

if [[ $# -eq 0 ]]; then
  usage >&2
  exit 2
fi
if [[ $1 == --help || $1 == -h ]]; then
  usage
  exit 0
fi

venv=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
if [[ ! -x $venv ]]; then
  venv=python3
fi
exec "${PYTHON:-$venv}" -m ccl_jax.main --job train "$@"
