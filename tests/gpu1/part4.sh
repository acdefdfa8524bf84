# LoRA
step lora 560 bash -c 'bench lora'
