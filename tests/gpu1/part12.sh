# What shards cost by themselves: the same steps, in a world of one, of the whole model and of its shards
sharded=$WORK/sharded.yaml plain=$one medium=qwen3-1.7b steps=8
sed 's/num_processes: 2/num_processes: 1/' configs/2gpu_fsdp2.yaml >"$sharded"
sizes="trainer.max_completion_length=256 trainer.per_device_train_batch_size=128 sampler.kv_cache_gib=8"
[ -z "${TINY:-}" ] || {
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
  plain=cpu2 sharded=cpu2_fsdp2 medium=tiny steps=4 # on a CPU shards are of two processes
}
export sharded plain medium steps sizes
step model 90 bash -c 'model $medium && check rows'
step pace 300 bash -c 'for run in whole cut; do
    [ $run = whole ] && machine=$plain || machine=$sharded
    train $run $machine $medium steps=$steps sampler.enforce_eager=true trainer.save_strategy=no && check exact $run $steps || exit 1
  done; check pace whole cut'
