"""Is this machine able to run exact mode, which kernels would be used and why, and what is in the way?

The checks are static: they read versions, environment variables and configurations, build kernels/*.c, and try the vendor
GEMM. No weights are loaded. torch is imported, which takes most of the time; transformers only for a MODEL; vLLM only with
--engine, in processes of its own.
"""
