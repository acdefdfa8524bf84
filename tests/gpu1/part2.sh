# Where the time goes
step profile 420 bash -c 'bench profile'
[ -n "${TINY:-}" ] || step logprob 90 bash -c 'bench logprob'
[ -n "${TINY:-}" ] || step attention 120 bash -c 'bench attention'
