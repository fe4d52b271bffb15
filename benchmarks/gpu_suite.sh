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

step() { # step NAME SECONDS COMMAND...; says whether it succeeded
  local name=$1 limit=$2
  shift 2
  local started=$SECONDS
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 # -k: a hung kernel may ignore the first signal
  local code=$? # 124: out of time
  if [ $code = 0 ]; then
    echo "ok     $name $((SECONDS - started)) s"
  else
    status=1
    echo "FAILED $name ($code) after $((SECONDS - started)) s; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log"
  fi
  return $code
}

if [ -n "$smoke" ]; then
  sparse=(--shape 256 384 --rounds 1 --bits 4)
  optimizers=(--model 7m --batch-size 1 --length 8 --rank 8 --rounds 1 --size 32 --refresh-rank 4 --methods)
else
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv || true
  sparse=(--shape 4096 14336 --bits 4 --rounds 11)
  # Of the methods that a step is compiled for, which takes most of the time.
  optimizers=(--model 130m --batch-size 64 --length 256 --rank 256 --rounds 3 --size 1024 --methods one_sided_lora)
fi
# The limits add up to 535 seconds. Each kernel has a process of its own: one that hangs takes nothing with it.
step versions 20 "$python" -c 'import jax, sys; print(sys.version, jax.__version__, jax.devices())'
check() { # check NAME SECONDS
  step "checks-$1" "$2" "$python" benchmarks/kernels.py --checks-only --implementations "$1" $smoke \
    --output "$out/checks-$1"
}
works=(xla)
check pallas_triton 45 && works+=(pallas_triton)
check mosaic_gpu 60 && works+=(mosaic_gpu)
check triton 25 && works+=(triton)
step kernels 150 "$python" benchmarks/kernels.py --quick --times-only --implementations "${works[@]}" $smoke --output "$out"
step model_decode 80 "$python" benchmarks/model_decode.py --implementations "${works[@]}" $smoke --output "$out"
step sparse_products 70 "$python" benchmarks/sparse_products.py "${sparse[@]}" --out "$out"
step optimizers 85 "$python" benchmarks/optimizers.py "${optimizers[@]}" --output "$out"
exit $status
