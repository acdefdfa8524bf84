# What drift does to a real model: an ablation whose runs share the GPU; it needs what part 6 needs. SEEDS, STEPS: of it.
# Twenty minutes: on a host that ends a command before, WHOLE=1600 and in the background
export seeds=${SEEDS:-3} steps=${STEPS:-300} recipe=words_gpu
# 32 rows at once, as each stock run would hold the activations of 256
export together="at_once=9 trainer.tokens_per_microbatch=8192 trainer.per_device_train_batch_size=32 trainer.gradient_accumulation_steps=8 \
sampler.kv_cache_gib=1"
[ -z "${TINY:-}" ] || {
  seeds=0,1 steps=1 recipe=words
  together="trainer.per_device_train_batch_size=8 trainer.num_generations=4 data.eval_size=4"
}
step ablate 1500 bash -c 'cd "$WORK" && rm -rf runs/ablation-drift && $PY -m rlinvariant ablate recipe=$recipe seeds=$seeds steps=$steps \
  arms=exact,drift,drift-sequence-mask run=drift trainer.save_strategy=no wandb.mode=disabled $together'
step drift 20 bash -c 'cd "$WORK" && $PY -m rlinvariant.bench drift runs/ablation-drift --out "$OUT/results"'
