# A server on the second GPU, or on the one that SERVER_GPU names, and a trainer on the first:
# ten steps; a wrong token; a word flipped on its way; a server that is killed. LORA=8: ten steps of adapters of that rank alone
set -u
gpu() { [ -n "${TINY:-}" ] || export CUDA_VISIBLE_DEVICES=$1; } # of this shell and what it starts
cd "$WORK"
url=http://127.0.0.1:8471
(umask 077; $PY -c 'import secrets; print(secrets.token_hex(32))' >right.token; $PY -c 'import secrets; print(secrets.token_hex(32))' >wrong.token)
serve() {
  (gpu ${SERVER_GPU:-1}; exec $PY -m rlinvariant serve "$WORK/$small" --port 8471 --trainer-token-file right.token --max-model-len 512 ${LORA:+--lora r=$LORA} \
    --kv-cache-memory-bytes 1073741824 >"$OUT/server.txt" 2>&1) &
  server=$!
  for _ in $(seq 240); do
    $PY -c "import urllib.request as u; u.urlopen('$url/health', timeout=2)" 2>/dev/null && return 0
    kill -0 $server 2>/dev/null || { tail -5 "$OUT/server.txt"; return 1; }
    sleep 1
  done
  return 1
}
served() { # RUN TOKEN SETTINGS...
  local run=$1 token=$2; shift 2
  (gpu 0; train "$run" "$one" "$small" sampler.servers=$url sampler.trainer_token_file="$WORK/$token.token" trainer.save_strategy=no ${LORA:+lora.r=$LORA} "$@")
}
trap 'code=$?; set +e; kill $server 2>/dev/null; wait $server 2>/dev/null; exit $code' EXIT
set -e
serve
sizes="${sizes/sampler.kv_cache_gib=*/}"
served served right steps=10
check exact served 10
[ -z "${LORA:-}" ] || exit 0
code=0; served wrong wrong steps=1 >wrong.log 2>&1 || code=$?
grep '^error:' wrong.log
echo "row wrong token: exit code $code, $(grep -c '^error:' wrong.log) line"
[ $code = 2 ] && [ ! -d runs/wrong ]
code=0; GPU2_FLIP=1 served flipped right steps=4 >flipped.log 2>&1 || code=$?
grep '^error:' flipped.log
echo "row flipped word: exit code $code"
[ $code = 1 ] && grep -q "of the sampler's parameters differ from the trainer's" flipped.log
(code=0; served killed right steps=400 || code=$?; echo "code $code") >killed.log 2>&1 &
trainer=$!
for _ in $(seq 200); do grep -q ' 3/400' killed.log && break; sleep 1; done
kill -9 $server
wait $trainer || true
grep '^error:' killed.log
echo "row killed server: $(grep '^code' killed.log), $(grep -c '^error:' killed.log) line"
grep -q '^error: sampler.servers' killed.log
