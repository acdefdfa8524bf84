# The kernels of another chip, run on this one: two families and ten steps
export RLINVARIANT_PORTABLE=sm_80
for name in llama qwen3; do
  step "$name" 150 bash -c "family $name"
done
step model 60 bash -c 'model $small && check rows'
step steps 200 bash -c 'train portable $one $small steps=10 unproven_gpu=true trainer.save_strategy=no && check exact portable 10'
