# Mixtures, compiled: families, ten steps, and adapters on the attention of the 30B-A3B shape's quarter
big=qwen3-30b-a3b-quarter
[ -z "${TINY:-}" ] || big=tiny-moe
export big
step models 150 bash -c 'model tiny-moe && model $big && check rows'
step full 200 bash -c 'train full $one tiny-moe steps=10 trainer.save_strategy=no && check exact full 10'
for name in qwen3-moe olmoe mixtral; do
  step "$name" 150 bash -c "family $name"
done
step adapters 400 bash -c 'train adapters $one $big steps=4 lora.r=16 lora.target_modules=q_proj,k_proj,v_proj,o_proj \
  trainer.save_strategy=no && check exact adapters 4'
