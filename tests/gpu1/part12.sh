# What shards cost by themselves: the same steps, in a world of one, of the whole model and of its shards
sharded=$WORK/sharded.yaml plain=$one medium=qwen3-1.7b steps=8
sed 's/num_processes: 2/num_processes: 1/' configs/2gpu_fsdp2.yaml >"$sharded"
sizes="trainer.max_completion_length=256 trainer.per_device_train_batch_size=128 sampler.kv_cache_gib=8"
[ -z "${TINY:-}" ] || {
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
  export ACCELERATE_USE_CPU=true # of launchers without a configuration
  plain=cpu2 sharded=cpu2_fsdp2 medium=tiny steps=4 # on a CPU shards are of two processes
}
export sharded plain medium steps sizes
step model 90 bash -c 'model $medium && model $small && check rows'
step pace 300 bash -c 'for run in whole cut; do
    [ $run = whole ] && machine=$plain || machine=$sharded
    train $run $machine $medium steps=$steps sampler.enforce_eager=true trainer.save_strategy=no && check exact $run $steps || exit 1
  done; check pace whole cut'
# NCCL refuses two processes on one card, and vLLM a second process of one host there: so each is a host of its own
step two 200 bash -c 'rm -rf "$WORK/runs/two"; pids=
  for node in 0 1; do
    (cd "$WORK" && exec $PY -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank $node \
      --master-addr 127.0.0.1 --master-port 29521 "$ROOT/train.py" model="$WORK/$small" data.path=rows.jsonl \
      reward="$ROOT/tests/gpu2/reward.py:even" run=two steps=3 wandb.mode=disabled data.eval_size=4 trainer.num_generations=4 \
      trainer.save_strategy=no sampler.max_model_len=512 sampler.enforce_eager=true completions_gib=0 trainer.ddp_backend=gloo \
      trainer.tokens_per_microbatch=4096 ${sizes/kv_cache_gib=8/kv_cache_gib=1}) & pids+=" $!"
  done
  for pid in $pids; do wait $pid || exit 1; done
  check exact two 3'
