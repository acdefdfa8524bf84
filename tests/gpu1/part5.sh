# Mixtures
step moe 550 bash -c 'bench moe'
