# A server on the second GPU, a trainer on the first
step model 120 bash -c 'model $small && check rows'
step served 500 bash tests/gpu2/served.sh
