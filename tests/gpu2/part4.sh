# How fast: our columns, vLLM's own cut, and one GPU, with CUDA graphs
step model 200 bash -c 'model $large'
step two 420 $PY -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.gpu2.rates "$WORK/$large" exact stock
step one 200 $PY -m tests.gpu2.rates "$WORK/$large" exact
step targets 20 $PY -m tests.gpu2.check targets "$OUT/4-two.log"
