# Sourced by gpu1/run.sh and gpu2/run.sh, which set `part`: where things are, and how a step is run and told.
export ROOT=$PWD WORK=${WORK:-/tmp/$suite} OUT=${OUT:-${WORK:-/tmp/$suite}/out}
mkdir -p "$OUT" "$WORK"
export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
PY=${PYTHON:-python3} slower=1 whole=${WHOLE:-550} # seconds of a part, from the start of the script
# A host without a package index: the packages come as an archive, and the plugin is found through metadata that stands apart
if [ -f .gpu/site.tar.xz ] && [ -z "${TINY:-}" ]; then
  [ -d ~/site ] || { mkdir -p ~/site && tar xJf .gpu/site.tar.xz -C ~/site; }
  mkdir -p ~/ep/rlinvariant-0.1.0.dist-info
  printf '[vllm.general_plugins]\nrlinvariant = rlinvariant.sampler.plugin:register\n' >~/ep/rlinvariant-0.1.0.dist-info/entry_points.txt
  printf 'Metadata-Version: 2.1\nName: rlinvariant\nVersion: 0.1.0\n' >~/ep/rlinvariant-0.1.0.dist-info/METADATA
  export PYTHONPATH=~/site:$ROOT:~/ep
else
  export PYTHONPATH=$ROOT
fi
if [ -n "${TINY:-}" ]; then
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 RLINVARIANT_CACHE=$WORK/cache
  slower=4
fi
began=$SECONDS failed=0 seen=" "

step() { # NAME SECONDS COMMAND...: run a step, for as long at most, and say in a line how it ended
  local name=$1 most=$(($2 * slower)) left=$((whole * slower - SECONDS)) at=$SECONDS code; shift 2
  seen+="$name "
  [[ -z "${ONLY:-}" || " $ONLY " == *" $name "* ]] || return 0
  [ $left -ge 1 ] || { echo "== $part $name: FAILED (no time was left)"; failed=$((failed + 1)); return 1; }
  # SIGTERM lets a benchmark end its processes and remove its models, which takes a while
  timeout -k 30 $((most < left ? most : left)) "$@" >"$OUT/$part-$name.log" 2>&1; code=$?
  if [ $code = 0 ]; then word=ok; else word="FAILED (exit code $code)"; failed=$((failed + 1)); fi
  echo "== $part $name: $word, $((SECONDS - at)) s"
  grep -aE '^(row|error:|exact|mismatched|on policy)|mismatched [0-9]|AssertionError' "$OUT/$part-$name.log" | tail -12
  grep -a '^peak' "$OUT/$part-$name.log" | sort -g -k4 | tail -1 # step, rank, GiB at most so far
  return $code
}
model() { $PY -m tests.gpu2.make "$1" "$WORK/$1"; } # makes a model with random weights, once a machine
train() { # RUN MACHINE MODEL SETTINGS...: a run in $WORK/runs
  local run=$1 machine=$2 path=$WORK/$3; shift 3
  (cd "$WORK" && rm -rf "runs/$run" && train_on "$run" "$machine" "$path" "$@")
}
train_on() { # the same, on what the run has left
  local run=$1 machine=$2 path=$3; shift 3
  cd "$WORK" && $PY -m rlinvariant train model="$path" data.path=rows.jsonl reward="$ROOT/tests/gpu2/reward.py:even" \
    machine="$machine" run="$run" wandb.mode=disabled data.eval_size=4 trainer.num_generations=4 save_dtype="${dtype:-float32}" \
    trainer.learning_rate=1e-5 sampler.max_model_len=512 completions_gib=0 $sizes "$@"
}
check() { (cd "$WORK" && $PY -m tests.gpu2.check "$@"); }
export -f model train train_on check
export PY
ended() { # says how the part has ended, and ends with the number of steps that failed, or are not there
  for name in ${ONLY:-}; do
    [[ "$seen" == *" $name "* ]] || { echo "== $part $name: FAILED (ONLY names a step that part $part has not)"; failed=$((failed + 1)); }
  done
  cat "$OUT/$part-"*.log | grep -a '^row ' >"$OUT/part$part.rows"
  echo "== part $part: $failed failed, $((SECONDS - began)) s"
  exit $failed
}
