# Rollouts and whole steps against stock
step sampler 300 bash -c 'bench sampler'
step step 270 bash -c 'bench step'
