# Weights in shards: the weights of data parallel, bit for bit; resumed; with activations recomputed; and an 8B model
clipped="steps=2 trainer.max_grad_norm=0.05 trainer.lr_scheduler_type=constant trainer.warmup_steps=0 sampler.enforce_eager=true"
export clipped plain="${clipped/0.05/0}"
step model 150 bash -c 'model $medium && check rows'
step clipped 240 bash -c 'train whole $ddp $medium $clipped trainer.save_strategy=no & a=$!
  train cut $shards $medium $clipped trainer.save_steps=2 & b=$!
  train again $shards $medium $clipped trainer.save_strategy=no trainer.gradient_checkpointing=true & c=$!
  wait $a && wait $b && wait $c && check exact whole 2 && check exact cut 2 && check weights whole cut && check weights cut again'
step plain 200 bash -c 'rm -rf $WORK/runs/again; train whole2 $ddp $medium $plain trainer.save_strategy=no & a=$!
  train cut2 $shards $medium $plain trainer.save_strategy=no & b=$!
  wait $a && wait $b && check weights whole2 cut2 && check differ cut cut2'
step resume 220 bash -c 'rm -rf $WORK/runs/whole2 $WORK/runs/cut2; four=${clipped/steps=2/steps=4}
  train straight $shards $medium $four trainer.save_strategy=no & a=$!
  train_on cut $shards $WORK/$medium $four trainer.save_steps=2 resume=true & b=$!
  wait $a && wait $b && check weights straight cut'
step large 300 bash -c 'rm -rf $WORK/runs; model $large && sizes=${sizes/train_batch_size=32/train_batch_size=8} dtype=bfloat16
  train large $shards $large steps=3 trainer.save_strategy=no sampler.enforce_eager=true && check exact large 3'
