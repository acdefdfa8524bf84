#!/bin/bash
# What needs two GPUs of one host, in five parts of at most nine minutes each: two sittings of half an hour, 1 2, then 3 4 5.
#
#   tests/gpu2/run.sh PART            PART 1 to 5; on two H100 or H200, from the repository's root
#   TINY=1 tests/gpu2/run.sh PART     the same commands on a CPU, small, joined by gloo: what is tried before a sitting
#
# On a lent host: carry .gpu (site.tar.xz of ../shared/gpu/pack.py); setup is done here. Each step ends in a line
#   == PART STEP: ok|FAILED, SECONDS s
# and the script with the number of steps that failed. Logs and rows go to $OUT (by default /tmp/gpu2/out), models to /tmp/gpu2.
set -u
part=${1:?"which part: 1 to 5"}
cd "$(dirname "$0")/../.."
export ROOT=$PWD WORK=${WORK:-/tmp/gpu2} OUT=${OUT:-${WORK:-/tmp/gpu2}/out}
mkdir -p "$OUT" "$WORK"
# NVLink multicast stays off: it can put a host's GPUs out of service
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
export RLINVARIANT_UNPROVEN_GPU=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
PY=${PYTHON:-python3}
if [ -f .gpu/site.tar.xz ] && [ -z "${TINY:-}" ]; then
  [ -d ~/site ] || { mkdir -p ~/site && tar xJf .gpu/site.tar.xz -C ~/site; }
  mkdir -p ~/ep/rlinvariant-0.1.0.dist-info
  printf '[vllm.general_plugins]\nrlinvariant = rlinvariant.sampler.plugin:register\n' >~/ep/rlinvariant-0.1.0.dist-info/entry_points.txt
  printf 'Metadata-Version: 2.1\nName: rlinvariant\nVersion: 0.1.0\n' >~/ep/rlinvariant-0.1.0.dist-info/METADATA
  export PYTHONPATH=~/site:$ROOT:~/ep
else
  export PYTHONPATH=$ROOT
fi
if [ -n "${TINY:-}" ]; then
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 RLINVARIANT_CACHE=$WORK/cache
  small=tiny medium=tiny large=tiny ddp=cpu2 shards=cpu2_fsdp2 one=cpu slower=4
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
else
  small=qwen3-0.6b medium=qwen3-1.7b large=qwen3-8b ddp=2gpu shards=2gpu_fsdp2 one=1gpu slower=1
  sizes="trainer.max_completion_length=64 trainer.per_device_train_batch_size=32 sampler.kv_cache_gib=2"
fi
began=$SECONDS failed=0

step() { # NAME SECONDS COMMAND...: run a step, and say in a line how it ended
  local name=$1 most=$(($2 * slower)) at=$SECONDS code; shift 2
  timeout -k 10 "$most" "$@" >"$OUT/$part-$name.log" 2>&1; code=$?
  if [ $code = 0 ]; then word=ok; else word="FAILED (exit code $code)"; failed=$((failed + 1)); fi
  echo "== $part $name: $word, $((SECONDS - at)) s"
  grep -aE '^(row|error:|exact|mismatched|on policy)|mismatched [0-9]|AssertionError' "$OUT/$part-$name.log" | tail -12
  grep -a '^peak' "$OUT/$part-$name.log" | sort -g -k4 | tail -1 # step, rank, GiB at most so far
  return $code
}
model() { $PY -m tests.gpu2.make "$1" "$WORK/$1"; } # makes a model with random weights, once a machine
train() { # RUN MACHINE MODEL SETTINGS...: a run in $WORK/runs
  local run=$1 machine=$2 path=$WORK/$3; shift 3
  (cd "$WORK" && rm -rf "runs/$run" && train_on "$run" "$machine" "$path" "$@")
}
train_on() { # the same, on what the run has left
  local run=$1 machine=$2 path=$3; shift 3
  cd "$WORK" && $PY -m rlinvariant train model="$path" data.path=rows.jsonl reward="$ROOT/tests/gpu2/reward.py:variety" \
    machine="$machine" run="$run" wandb.mode=disabled data.eval_size=4 trainer.num_generations=4 save_dtype="${dtype:-float32}" \
    trainer.learning_rate=1e-5 sampler.max_model_len=512 completions_gib=0 $sizes "$@"
}
check() { (cd "$WORK" && $PY -m tests.gpu2.check "$@"); }
export -f model train train_on check
export PY small medium large ddp shards one sizes

. tests/gpu2/part$part.sh
cat "$OUT/$part-"*.log | grep -a '^row ' >"$OUT/part$part.rows"
echo "== part $part: $failed failed, $((SECONDS - began)) s"
exit $failed
