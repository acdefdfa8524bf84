# Mixtures
step moe 420 bash -c 'bench moe'
