# Recipes with a real model
steps=${STEPS:-60} few=10 kind=_gpu least=
[ -z "${TINY:-}" ] || steps=1 few=1 kind= least="trainer.per_device_train_batch_size=8 trainer.num_generations=4 data.eval_size=4"
recipe() { # NAME SETTINGS...: a run in $WORK/runs, every token of which has to be compared and equal
  (cd "$WORK" && rm -rf "runs/$1" && $PY -m rlinvariant train recipe="$1" run="$1" steps="$steps" wandb.mode=disabled "${@:2}") &&
    check exact "$1" "$steps"
}
export -f recipe
export steps
step words 200 bash -c "recipe words$kind $least"
step words_lora 200 bash -c "recipe words_lora$kind $least"
step reasoning_gym 200 bash -c "recipe reasoning_gym$kind data.task=simple_equations $least"
step calculator 200 bash -c "steps=$few recipe calculator ${least:-trainer.per_device_train_batch_size=64}"
step guess 200 bash -c "steps=$few recipe guess $least"
step top_p 200 bash -c "steps=$few recipe words$kind trainer.top_p=0.95 $least"
