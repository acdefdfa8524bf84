# Links, and data parallel: the bytes of one GPU, and a fault on rank 1 that ends both
step topology 30 bash -c 'nvidia-smi topo -m; nvidia-smi -L; true'
step collectives 90 $PY -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.gpu2.collectives
step model 120 bash -c 'model $small && check rows'
step ddp 220 bash -c 'train ddp $ddp $small steps=10 trainer.save_strategy=no && check exact ddp 10'
step one 150 bash -c 'batch=$(( $(sed "s/.*train_batch_size=\([0-9]*\).*/\1/" <<<"$sizes") * 2 ))
  sizes=$(sed "s/train_batch_size=[0-9]*/train_batch_size=$batch/" <<<"$sizes")
  train one $one $small steps=1 trainer.save_strategy=no sampler.enforce_eager=true && check rollout ddp one'
step fault 150 bash -c 'export GPU2_FAULT=$WORK/fault; rm -f $GPU2_FAULT
  train fault $ddp $small steps=4 trainer.save_strategy=no sampler.enforce_eager=true; code=$?; check fault fault $GPU2_FAULT $code'
