# Rollouts and whole steps against stock
step step 270 bash -c 'bench step'
step sampler 330 bash -c 'bench sampler'
