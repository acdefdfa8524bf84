"""One prompt, 1,000 times at temperature 0, among changing traffic, with the ops off and on.

A server's answer at temperature 0 should not depend on who else is being served. Stock kernels change their order of summation
with the batch, so bits differ at once, and a token as soon as two are nearly as likely. The experiment is that of Horace He and
Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025.
"""
