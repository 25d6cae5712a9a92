#!/usr/bin/env bash
# Measures the speed of this machine's devices; goes on where one part fails, and says so at the end.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/benchmark.sh OUT [--small]

Runs on the devices at hand, and writes into the folder OUT, a log for each part: the tests of
ccl_jax that need no data (where pytest is installed), the benchmark job of configs/mvtec.py for
batches of 16, 64 and 128 images of 256x256 in float32 and bfloat16 (its training step and scoring
alone where the job's packages are missing, or the job fails), a profile of one step with its ten
longest kernels, the forms of single computations, and, where their packages are installed, the
memory of the step, the metrics at scale and the comparison with PyTorch. Needs no data and no
weights, and of the dependencies at least jax, flax, optax, orbax, jaxtyping, safetensors, filelock
and tqdm. OUT/summary.txt says what was done, OUT/benchmarks.md has the tables as docs/benchmarks.md
has them; the exit status is 1 if a part failed.

  --small  sizes for a CPU: ResNet-18, 64x64, 4 images, 2 steps, and what takes longer is left out
  PYTHON   the interpreter; without it that of the project's .venv, else python3

Example: launch/benchmark.sh runs/benchmark
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
out= small=
for word; do
  case $word in
    --small) small=yes ;;
    -*) usage >&2 && exit 2 ;;
    *) out=$word ;;
  esac
done
if [[ -z $out ]]; then
  usage >&2
  exit 2
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
  python=python3
fi
cd "$root"

batches="16 64 128" size=256 encoder=wide_resnet50_2 steps=20 warm_up=3
if [[ -n $small ]]; then
  batches=4 size=64 encoder=resnet18 steps=2 warm_up=1
fi
: >"$out/summary.txt"
status=0

note() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

code=0
part() { # NAME COMMAND...: its output goes to the terminal and to OUT/NAME.log, its status to code
  local name=$1
  shift
  code=0
  "$@" 2>&1 | tee "$out/$name.log" || code=$?
  if [[ $code -eq 0 ]]; then
    note "done: $name"
  else
    note "FAILED with status $code: $name, see $out/$name.log"
    status=1
  fi
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if command -v nvidia-smi >/dev/null; then
  part devices nvidia-smi
fi
tests=(tests/test_losses.py tests/test_augment.py tests/test_network.py tests/test_anomaly_map.py)
if [[ -n $small ]]; then
  tests=(tests/test_anomaly_map.py)
fi
if has pytest && has beartype; then
  # The tests take the CPU unless told otherwise; "" lets JAX choose. Their bounds are those of
  # float32, not of TF32.
  part tests env JAX_PLATFORMS="${JAX_PLATFORMS-}" JAX_DEFAULT_MATMUL_PRECISION=highest \
    "$python" -m pytest -q -p no:cacheprovider -k "not four_devices" "${tests[@]}"
else
  note "left out: tests, because pytest or beartype is not installed"
fi

page=$out/benchmarks.md
missing=
for package in grain ml_collections tensorflow_datasets array_record fsspec; do
  has "$package" || missing+=" $package"
done
if [[ -n $missing ]]; then
  note "left out: the benchmark job, because of packages that are not installed:$missing"
fi
for dtype in float32 bfloat16; do
  for batch in $batches; do
    code=0
    if [[ -z $missing && (-z $small || $dtype == bfloat16) ]]; then
      part "job-$batch-$dtype" "$python" -m ccl_jax.main --job benchmark \
        --config configs/mvtec.py --workdir "$out/job-$batch-$dtype" \
        "--config.benchmark.page=$page" "--config.benchmark.steps=$steps" \
        "--config.benchmark.warm_up=$warm_up" --config.encoder.weights=random \
        "--config.model.encoder=$encoder" "--config.model.compute_dtype=$dtype" \
        "--config.data.image_size=$size" "--config.train.batch_size=$batch" \
        "--config.eval.batch_size=$batch"
    fi
    profile=()
    if [[ $batch == 16 && $dtype == bfloat16 || -n $small && $dtype == float32 ]]; then
      profile=(--profile "$out/profile-$batch-$dtype")
    fi
    # What the job has not timed, or could not.
    if [[ -n $missing || $code -ne 0 || ${#profile[@]} -gt 0 ]]; then
      part "step-$batch-$dtype" "$python" -m ccl_jax.benchmark.step --batch "$batch" \
        --dtype "$dtype" --encoder "$encoder" --image-size "$size" --steps "$steps" \
        --warm-up "$warm_up" --json "$out/step-$batch-$dtype.json" "${profile[@]}"
    fi
  done
done

reference() { # NAME PACKAGE: tests.reference.NAME, where the package that it needs is installed
  if [[ -n $small ]]; then
    note "left out: $1, because of --small"
  elif [[ ! -f tests/reference/$1.py ]]; then
    note "left out: $1, because tests/reference/$1.py is not there"
  elif ! has "$2"; then
    note "left out: $1, because $2 is not installed"
  else
    part "$1" "$python" -m "tests.reference.$1" --page "$page"
  fi
}

reference kernels jax
reference memory ml_collections
reference speed_metrics sklearn
if [[ ! -f tests/reference/speed_torch.py ]]; then
  note "left out: PyTorch, because tests/reference/speed_torch.py is not there"
elif ! has torch; then
  note "left out: PyTorch, because torch is not installed"
else
  part torch "$python" -m tests.reference.speed_torch --batches "${batches// /,}" \
    --image-size "$size" --encoder "$encoder" --json "$out/torch.json" --page "$page"
fi
note "all is in $out"
exit "$status"
