#!/usr/bin/env bash
# All GPU checks and benchmarks in under nine minutes: correctness first, then times.
#   benchmarks/gpu_suite.sh [output folder]
# Needs Python with jax and its CUDA plugin; run from the root of the repository. Steps that fail
# or run out of time do not stop the others; the exit status says whether any did.
set -u
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false
status=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  local started=$SECONDS
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok     $name $((SECONDS - started)) s"
  else
    status=1
    echo "FAILED $name ($?) after $((SECONDS - started)) s; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log"
  fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv || true
step versions 60 "$python" -c 'import jax, sys; print(sys.version, jax.__version__, jax.devices())'
step checks 180 "$python" benchmarks/kernels.py --checks-only --output "$out/checks"
step kernels 270 "$python" benchmarks/kernels.py --quick --output "$out"
exit $status
