# Weights, word by word: shards against whole models in a world of one; gradients=invariant in micro-batches of two sizes
steps=2
sizes="trainer.max_completion_length=64 trainer.per_device_train_batch_size=32 sampler.kv_cache_gib=0.6"
leaves="${sizes/size=32/size=8}" halves="${sizes/size=32/size=4} trainer.gradient_accumulation_steps=2"
plain=$one sharded=$WORK/sharded.yaml
sed 's/num_processes: 2/num_processes: 1/' configs/2gpu_fsdp2.yaml >"$sharded"
[ -z "${TINY:-}" ] || {
  sizes="trainer.max_completion_length=8 trainer.per_device_train_batch_size=8 sampler.kv_cache_gib=0.1"
  leaves=$sizes halves="${sizes/size=8/size=4} trainer.gradient_accumulation_steps=2"
  plain=cpu2 sharded=cpu2_fsdp2 # on a CPU shards are of two processes
}
export plain sizes leaves halves sharded
export clipped="steps=$steps trainer.max_grad_norm=0.05 trainer.lr_scheduler_type=constant trainer.warmup_steps=0 sampler.enforce_eager=true \
trainer.save_strategy=no"
step model 60 bash -c 'model $small && check rows'
step shards 200 bash -c 'train whole $plain $small $clipped & a=$!
  train cut $sharded $small $clipped & b=$!
  train again $sharded $small $clipped trainer.gradient_checkpointing=true & c=$!
  wait $a && wait $b && wait $c && check exact whole 2 && check exact cut 2 && check weights cut again && check weights whole cut'
step leaves 200 bash -c 'sizes=$leaves; train leaf $one $small $clipped gradients=invariant & a=$!
  train stock $one $small $clipped & b=$!
  sizes=$halves; train half $one $small $clipped gradients=invariant & c=$!
  wait $a && wait $b && wait $c && check exact leaf 2 && check weights leaf half && check differ half stock'
