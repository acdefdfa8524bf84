# The other commands, once each: what they say is in the logs
rlinvariant() { (cd "$WORK" && $PY -m rlinvariant "$@"); }
export -f rlinvariant
export every="steps=6 trainer.save_steps=1 trainer.save_total_limit=9"
step model 60 bash -c 'model $small && check rows'
step doctor 60 bash -c 'rlinvariant doctor "$WORK/$small"'
# Killed after its second step, and resumed: the weights of a run that was not
step whole 150 bash -c 'train kept $one $small $every && check exact kept 6'
step killed 200 bash -c 'train killed $one $small $every & trainer=$!
  for _ in $(seq 900); do [ -d "$WORK/runs/killed/checkpoints/checkpoint-2" ] && break; kill -0 $trainer || break; sleep 0.2; done
  pkill -9 -f "[r]un=killed"; wait $trainer
  rlinvariant resume killed && check exact killed 6 && check weights kept killed'
step replay 120 bash -c 'rlinvariant replay kept --step 2'
step bisect 150 bash -c 'rlinvariant bisect "$WORK/$small" --tokens 16'
# Stock kernels part somewhere, and bisect says where: exit code 1
step stock 150 bash -c 'rlinvariant bisect "$WORK/$small" --tokens 16 --invariance off; [ $? = 1 ]'
step eval 120 bash -c 'rlinvariant eval kept --samples 2'
step demo 150 bash -c 'rlinvariant demo $small completions=200 run=demo'
