#!/bin/bash
# What needs two GPUs of one host, in five parts of nine minutes and a half at most: two sittings of half an hour, 1 2, then 3 4 5.
#
#   tests/gpu2/run.sh PART            PART 1 to 5; on two H100 or H200, from the repository's root
#   ONLY="model ddp" tests/gpu2/run.sh 1   these of its steps alone
#   TINY=1 tests/gpu2/run.sh PART     the same commands on a CPU, small, joined by gloo: what is tried before a sitting
#
# Each step ends in a line
#   == PART STEP: ok|FAILED, SECONDS s
# and the script with the number of steps that failed. Logs and rows go to $OUT (by default /tmp/gpu2/out), models to /tmp/gpu2.
set -u
part=${1:?"which part: 1 to 5"}
cd "$(dirname "$0")/../.."
suite=gpu2
. tests/gpu_steps.sh
# NVLink multicast stays off: it can put a host's GPUs out of service
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
if [ -n "${TINY:-}" ]; then
  small=tiny medium=tiny large=tiny ddp=cpu2 shards=cpu2_fsdp2 one=cpu
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
else
  small=qwen3-0.6b medium=qwen3-1.7b large=qwen3-8b ddp=2gpu shards=2gpu_fsdp2 one=1gpu
  sizes="trainer.max_completion_length=64 trainer.per_device_train_batch_size=32 sampler.kv_cache_gib=2"
fi
export small medium large ddp shards one sizes

. tests/gpu2/part$part.sh
ended
