# A sampler over both GPUs at 8B: 200,000 tokens against an unsharded trainer, and vLLM's own cut as the control
step model 200 bash -c 'model $large'
step columns 330 $PY -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.gpu2.columns "$WORK/$large"
step verify 300 bash -c 'cd $WORK && model $small && $PY -m rlinvariant verify $WORK/$small --short --tensor-parallel-size 2'
