import os

# Read when torch loads its OpenMP runtime: threads that wait sleep, so that kernels on a busy machine do not spin for seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
