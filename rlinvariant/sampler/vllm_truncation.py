"""vLLM's own truncation of logits, which our sampler does not use: a control."""

import torch
from torch import Tensor


def cut(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return logits [R, V] in fp32, with -inf where vLLM's top-k and top-p drop them, by its kernel for R rows."""
    # Here, as a start's proof imports this file and needs no control
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    k = torch.full((len(logits),), top_k, dtype=torch.int32, device=logits.device)
    return apply_top_k_top_p(logits.float().clone(), k, torch.full(k.shape, top_p, device=logits.device))
