#!/usr/bin/env bash
# All GPU checks and benchmarks in under nine minutes: correctness first, then times.
#   benchmarks/gpu_suite.sh [--smoke] [output folder]
# Needs Python with jax and its CUDA plugin; run from the root of the repository. Steps that fail
# or run out of time do not stop the others; the exit status says whether any did. --smoke runs
# every step in a tiny form on any machine, to show that the programs work.
set -u
smoke=
if [ "${1:-}" = --smoke ]; then
  smoke=--smoke
  shift
fi
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
    local code=$? # 124: out of time
    status=1
    echo "FAILED $name ($code) after $((SECONDS - started)) s; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log"
  fi
}

if [ -n "$smoke" ]; then
  sparse=(--shape 256 384 --rounds 1 --bits 4)
  optimizers=(--model 7m --batch-size 1 --length 8 --rank 8 --rounds 1 --size 32 --refresh-rank 4)
else
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv || true
  sparse=(--shape 4096 14336 --bits 4)
  optimizers=(--model 130m --batch-size 64 --length 256 --rank 256 --rounds 5 --size 1024)
fi
# The limits add up to 530 seconds.
step versions 20 "$python" -c 'import jax, sys; print(sys.version, jax.__version__, jax.devices())'
step checks 120 "$python" benchmarks/kernels.py --checks-only $smoke --output "$out/checks"
step kernels 160 "$python" benchmarks/kernels.py --quick $smoke --output "$out"
step model_decode 100 "$python" benchmarks/model_decode.py $smoke --output "$out"
step sparse_products 40 "$python" benchmarks/sparse_products.py "${sparse[@]}" --out "$out"
step optimizers 90 "$python" benchmarks/optimizers.py "${optimizers[@]}" --output "$out"
exit $status
