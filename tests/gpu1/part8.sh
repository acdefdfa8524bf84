# What training large models with adapters takes
step lora_large 550 bash -c 'bench lora_large'
