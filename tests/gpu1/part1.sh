# Bits
[ -n "${TINY:-}" ] || step ops 300 $PY -m pytest -q -n 8 -m gpu tests/ops tests/kernels --deselect tests/kernels/test_chunked_gpu.py
step waits 150 $PY -m pytest -q tests/trainer/test_passes.py
for name in qwen3-moe olmoe mixtral; do
  step "$name" 120 bash -c "family $name --eager"
done
step adapters 120 bash -c 'family llama --eager --lora r=8'
[ -n "${TINY:-}" ] || step chunked 150 bash -c "export RLINVARIANT_ATTENTION=chunked; family llama"
step model 60 bash -c "model $small && (cd $WORK && $PY -m tests.gpu2.check rows)"
step served 240 env SERVER_GPU=0 bash tests/gpu2/served.sh
step adapted 150 env SERVER_GPU=0 LORA=8 bash tests/gpu2/served.sh
