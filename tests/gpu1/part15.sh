# Soaks: tokens beyond 8k of context, and of short prompts; each run adds to what RESULTS has
RESULTS=${RESULTS:-$OUT/results} tokens=${TOKENS:-1000000}
export RESULTS tokens
[ -n "${TINY:-}" ] || step long 545 bash -c '$PY -m rlinvariant.bench parity --tokens $tokens --long --out "$RESULTS"'
[ -n "${TINY:-}" ] || step soak 545 bash -c '$PY -m rlinvariant.bench parity --tokens $tokens --out "$RESULTS"'
