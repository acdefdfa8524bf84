"""The last step of trainer and sampler: hidden states to log-probabilities, and logits to sampled tokens.

Both read the same statistics of a row (`softmax_row` of kernels/token_logprobs.c, `_logprobs` of kernels/token_logprobs.py):
x = logit / T, its maximum m, and s = sum exp(x - m) over fixed blocks of the vocabulary. The log-probability is
round32(x[token] - m - log s), formed in fp64.

T: tokens to score, R: rows to sample from, D: width of a hidden state, V: vocabulary.
"""

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.linear import add_product, linear, linear_ref, product
from rlinvariant.ops.register import define, require_dtype, widened
from rlinvariant.ops.scale_logits import _check_scaling, scale_logits, scale_logits_backward, scale_logits_ref
from rlinvariant.ops.threshold import keeps_all, rows_threshold, threshold_ref

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # logits held at a time


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    scale: float | None = None,
    softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of given tokens, and the entropy, without holding [tokens, vocabulary].

        x = scale_logits(linear(hidden, weight), scale, softcap) / temperature
        logprob = x[id] - logsumexp(x);  entropy = -sum softmax(x) log softmax(x)

    With top_k, top_p or min_p, of the tokens that `threshold` keeps: the others count as -inf, and have no gradient.

    Args:
        hidden: [T, D] final hidden states, bf16 or fp32.
        weight: [V, D] of the lm_head, any float dtype; cast to hidden.dtype at use.
        token_ids: [T] int64, in [0, V).
        temperature: divides the logits, in fp32; positive.
        scale, softcap: as for `scale_logits`.
        top_k, top_p, min_p: as for `threshold`, the same for all tokens; 0, 1 and 0 keep all.

    Returns:
        (logprobs, entropy), both [T] fp32, both with gradients. A token outside of the kept set has log-prob -inf.

    Raises:
        IndexError: a token id lies outside [0, V). On a GPU, which would have to be waited for, the log-prob, the entropy and
            the gradients of such a token are NaN instead.
        ValueError: shapes, dtypes or the temperature are not as above.

    Order: logits in hidden.dtype as by `linear`; exponentials summed inside blocks of 4,096 columns, by `lanes` (CPU) or in
        one fixed tree, relative to the block's maximum (CUDA); block sums in fp64. The backward recomputes the logits of a
        chunk of tokens at a time, writes their gradients over them, and adds dweight chunk by chunk.
    Bits: logprobs[t] depends on hidden[t], weight and token_ids[t] alone, and equals what `sample` returns for that row of
        logits. Gradients are deterministic; dweight depends on the chunks.
    Ref: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax; here in two passes).
    """
    return _token_logprobs(hidden, weight, token_ids, temperature, scale, softcap, top_k, top_p, min_p)[:2]


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, theta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverse CDF, with its log-probability.

        token = first j with sum_{i <= j} exp(x[i] - m) > u sum_i exp(x[i] - m),  x = logits / temperature

    u in [0, 1) is a hash of (seed, position): no generator has a state, so neither the batch, nor a preempted or chunked
    request, nor a resumed run can shift the noise. Temperature 0 takes the first maximum, with its log-prob at temperature 1.

    Args:
        logits: [R, V], bf16 or fp32.
        temperature: [R] fp32, >= 0.
        seeds: [R] int64, one per request.
        positions: [R] int64, how many tokens the request has drawn.
        theta: [R] fp32, of `threshold`: smaller logits count as -inf. None: all count.

    Returns:
        (tokens [R] int64, logprobs [R] fp32, ranks [R] int64: how many tokens are likelier).

    Order: as in `token_logprobs`; the running sum over the vocabulary in fp64.
    Bits: row r of each output depends on row r of the inputs alone.
    Ref: Steele et al. 2014 (SplitMix), for the hash.
    """
    return _sample(logits, temperature, seeds, positions, _as_read(theta, len(temperature)))


def log_softmax(logits: Tensor, temperature: Tensor, theta: Tensor | None = None) -> Tensor:
    """Compute log-probabilities of the whole vocabulary, [R, V] fp32, with the bits of `token_logprobs` and `sample`.

    With `theta`, [R] fp32 of `threshold`, those of smaller logits are -inf.
    """
    logits_RV, t_R = logits.contiguous(), torch.where(temperature == 0, 1.0, temperature).float().contiguous()
    _, _, stats_R2 = _row_logprobs(logits_RV, None, t_R, _as_read(theta, len(t_R)))
    # IEEE arithmetic alone from here, so torch gives the bits that the kernels give for one token
    return ((_kept(logits_RV.float(), theta) / t_R[:, None]).double() - stats_R2[:, 0:1] - stats_R2[:, 1:2]).float()


def log_softmax_ref(logits: Tensor, temperature: Tensor, theta: Tensor | None = None) -> Tensor:
    """Compute `log_softmax` in plain PyTorch: logits of any float dtype; fp64 if they are, else fp32."""
    return torch.log_softmax(_kept(widened(logits), theta) / torch.where(temperature == 0, 1.0, temperature)[:, None], -1)


def _as_read(theta: Tensor | None, rows: int) -> Tensor | None:
    """Return theta as kernels read it. Raises ValueError unless it is fp32 [rows], or None."""
    if theta is not None and (theta.shape != (rows,) or theta.dtype != torch.float32):
        raise ValueError(f"theta: expected fp32 [{rows}], as `threshold` gives it, got {theta.dtype} {tuple(theta.shape)}")
    return None if theta is None else theta.contiguous()


def _kept(logits: Tensor, theta: Tensor | None) -> Tensor:
    """Return logits [R, V] with -inf where they are below theta [R]."""
    return logits if theta is None else logits.masked_fill(logits < theta[:, None], float("-inf"))


def token_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    scale: float | None = None,
    softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` in plain PyTorch, holding the whole [T, V]; differentiable by autograd."""
    logits_TV = scale_logits_ref(linear_ref(hidden, weight), scale, softcap)
    each = (torch.full(token_ids.shape, x, dtype=torch.float32, device=hidden.device) for x in (temperature, top_p, min_p))
    t_T, p_T, m_T = each
    theta_T = threshold_ref(logits_TV.detach(), t_T, torch.full_like(token_ids, top_k), p_T, m_T)
    logprobs_TV = torch.log_softmax(_kept(widened(logits_TV), theta_T) / temperature, -1)
    weighted_TV = torch.where(logprobs_TV == -torch.inf, 0.0, logprobs_TV.exp() * logprobs_TV)
    return logprobs_TV.gather(-1, token_ids[:, None])[:, 0], -weighted_TV.sum(-1)


def sample_ref(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, theta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sample` in plain PyTorch, in fp64: another token only where u is within rounding of the edge between two."""
    x_RV, logprobs_RV = widened(logits).double(), log_softmax_ref(logits.double(), temperature, theta)
    cdf_RV, u_R = logprobs_RV.exp().cumsum(-1), _uniform(seeds, positions)
    drawn_R1 = torch.searchsorted(cdf_RV, u_R[:, None] * cdf_RV[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    tokens_R1 = torch.where(temperature[:, None] == 0, x_RV.argmax(-1, keepdim=True), drawn_R1)
    return tokens_R1[:, 0], logprobs_RV.gather(1, tokens_R1)[:, 0].float(), (x_RV > x_RV.gather(1, tokens_R1)).sum(1)


def _uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return u of `sample`, [R] fp64, by splitmix64's finaliser, twice; int64 wraps, and shifts are made logical by masks."""
    z = seeds + (positions + 1) * -0x61C8864680B583EB
    for _ in range(2):
        z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
        z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
        z = z ^ (z >> 31 & (1 << 33) - 1)
    return (z >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _row_logprobs_cpu(
    logits: Tensor, ids: Tensor | None, temperature: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = (torch.empty(len(logits), dtype=torch.float32) for _ in range(2))
    stats = torch.empty(len(logits), 2, dtype=torch.float64)
    outputs = (None, None, stats) if ids is None else (logprobs, entropy, stats)
    cpu.call("token_logprobs", logits, ids, temperature, theta, *outputs, *logits.shape, cpu.is_bf16(logits))
    return logprobs, entropy, stats


def _row_logprobs_backward_cpu(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    theta: Tensor | None,
    *_: Tensor,
) -> None:
    inputs = (logits, ids, temperature, theta, dlogprobs, dentropy, logits)
    cpu.call("token_logprobs_backward", *inputs, *logits.shape, cpu.is_bf16(logits))


_row_logprobs = define(
    "row_logprobs(Tensor logits, Tensor? ids, Tensor temperature, Tensor? theta) -> (Tensor, Tensor, Tensor)",
    cpu=_row_logprobs_cpu,
    cuda="token_logprobs.row_logprobs",
    fake=lambda x, ids, t, theta: (t.new_empty(t.shape), t.new_empty(t.shape), t.new_empty(t.shape[0], 2, dtype=torch.float64)),
    check=lambda x, ids, t, theta: require_dtype("row_logprobs", x),
)
"""Takes contiguous logits; gives log-probs, entropies [R] fp32 (undefined without ids), and (maximum, log sum) [R, 2] fp64."""
_row_logprobs_backward = define(
    "row_logprobs_backward(Tensor(a!) logits, Tensor ids, Tensor temperature, Tensor dlogprobs, Tensor? dentropy, "
    "Tensor? theta, Tensor logprobs, Tensor entropy, Tensor stats) -> ()",
    cpu=_row_logprobs_backward_cpu,
    cuda="token_logprobs.row_logprobs_backward",
    fake=lambda *_: None,
)
"""Writes the gradient of contiguous logits over them; the last three arguments are what `_row_logprobs` gave for them."""


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    tokens, rows = len(hidden), max(256, CHUNK_BYTES[hidden.device.type] // (len(weight) * hidden.element_size()) // 256 * 256)
    if hidden.is_cuda:  # of equal sizes: each costs a pass over dweight, and a GEMM of few rows the time of many
        rows = max(256, -(-tokens // -(-tokens // rows) // 256) * 256) if tokens else rows
    return [slice(at, at + rows) for at in range(0, tokens, rows)]


def _check(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, scale, softcap, *truncation) -> None:
    require_dtype("token_logprobs", hidden)
    _check_scaling(scale, softcap)
    if hidden.dim() != 2 or token_ids.shape != hidden.shape[:1] or token_ids.dtype is not torch.int64 or not temperature > 0:
        got = f"token_ids {token_ids.dtype} {tuple(token_ids.shape)}, temperature {temperature}"
        raise ValueError(f"token_logprobs: expected token_ids int64 [{len(hidden)}] and a positive temperature, got {got}")
    if token_ids.is_cuda or not token_ids.numel():  # on a GPU, looking would wait for it at every call: see `_targets`
        return
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < weight.shape[0]:
        raise IndexError(f"token_logprobs: token ids must lie in [0, {weight.shape[0]})")


def _targets(token_ids: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ids inside the vocabulary, and temperatures, NaN where an id was outside: all results of its row are NaN."""
    inside = token_ids.clamp(0, vocab - 1).contiguous()
    temperatures = torch.full(token_ids.shape, temperature, dtype=torch.float32, device=token_ids.device)
    return inside, temperatures.masked_fill(inside != token_ids, float("nan"))


def _empty(hidden: Tensor, *truncation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return room for what `_forward` returns: log-probs, entropies, statistics [T, 2], and thetas, [0] where all are kept."""
    tokens = hidden.shape[0]  # len() would make a number of a size that a compiler leaves open
    sizes = tokens, tokens, 0 if keeps_all(*truncation) else tokens
    logprobs_T, entropy_T, theta_T = (hidden.new_empty(n, dtype=torch.float32) for n in sizes)
    return logprobs_T, entropy_T, hidden.new_empty(tokens, 2, dtype=torch.float64), theta_T


def _forward(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, scale, softcap, *truncation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w_VD, (ids_T, temperatures_T) = weight.to(hidden.dtype), _targets(token_ids, weight.shape[0], temperature)
    logprobs_T, entropy_T, stats_T2, thetas_T = _empty(hidden, *truncation)
    for c in _chunks(hidden, w_VD):
        logits_TV = scale_logits(linear(hidden[c], w_VD), scale, softcap)
        if (theta_T := rows_threshold(logits_TV, temperatures_T[c], *truncation)) is not None:
            thetas_T[c] = theta_T
        logprobs_T[c], entropy_T[c], stats_T2[c] = _row_logprobs(logits_TV, ids_T[c], temperatures_T[c], theta_T)
    return logprobs_T, entropy_T, stats_T2, thetas_T


def _save(ctx, inputs, output) -> None:
    hidden, weight, token_ids, ctx.temperature, *rest = inputs
    ctx.scaling = rest[:2]
    ctx.save_for_backward(hidden, weight, token_ids, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # an entropy that nobody asks the gradient of costs none


def _backward(ctx, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: None):
    hidden, weight, token_ids, *found_T, thetas_T = ctx.saved_tensors
    w_VD, (ids_T, temperatures_T) = weight.to(hidden.dtype), _targets(token_ids, weight.shape[0], ctx.temperature)
    dlogprobs_T = torch.zeros_like(temperatures_T) if dlogprobs is None else dlogprobs.contiguous()
    dentropy_T = None if dentropy is None else dentropy.contiguous()
    dhidden_TD, dweight_VD = torch.empty_like(hidden), None
    for c in _chunks(hidden, w_VD):
        logits_TV = linear(hidden[c], w_VD)
        dlogits_TV = scale_logits(logits_TV, *ctx.scaling)
        dchunk_T, theta_T = None if dentropy_T is None else dentropy_T[c], thetas_T[c] if len(thetas_T) else None
        given_T = ids_T[c], temperatures_T[c], dlogprobs_T[c], dchunk_T, theta_T, *(x[c] for x in found_T)
        _row_logprobs_backward(dlogits_TV, *given_T)
        if dlogits_TV is not logits_TV:
            dlogits_TV = scale_logits_backward(dlogits_TV, logits_TV, *ctx.scaling)
        torch.mm(dlogits_TV, w_VD, out=dhidden_TD[c])
        if not ctx.needs_input_grad[1]:  # beside adapters the lm_head is frozen
            continue
        if dweight_VD is None:
            dweight_VD = product(dlogits_TV.t(), hidden[c], torch.float32)
        else:
            add_product(dweight_VD, dlogits_TV.t(), hidden[c])
    if not ctx.needs_input_grad[1]:
        return dhidden_TD, *[None] * 8
    return dhidden_TD, torch.zeros_like(weight) if dweight_VD is None else dweight_VD.to(weight.dtype), *[None] * 7


def _sample_check(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, theta: Tensor | None) -> None:
    require_dtype("sample", logits)
    rows = logits.shape[0]
    per_row = temperature.shape == seeds.shape == positions.shape == (rows,)
    positive = logits.is_cuda or bool((temperature >= 0).all())  # on a GPU, looking would wait for it at every step
    if not per_row or not seeds.dtype == positions.dtype == torch.int64 or not positive:
        raise ValueError(f"sample: expected temperature >= 0, seeds and positions int64, each of [{rows}]")


def _sample_cpu(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits, rows = logits.contiguous(), logits.shape[0]
    inputs = (logits, temperature.float().contiguous(), theta, seeds.contiguous(), positions.contiguous())
    outputs = (
        torch.empty(rows, dtype=torch.int64),
        torch.empty(rows, dtype=torch.float32),
        torch.empty(rows, dtype=torch.int64),
    )
    cpu.call("sample", *inputs, *outputs, *logits.shape, cpu.is_bf16(logits))
    return outputs


_token_logprobs = define(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor token_ids, float temperature, float? scale, float? softcap, "
    "int top_k, float top_p, float min_p) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward,
    cuda=_forward,
    fake=lambda hidden, weight, ids, t, scale, softcap, *truncation: _empty(hidden, *truncation),
    check=_check,
    save=_save,
    backward=_backward,
)
_sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor? theta) -> (Tensor, Tensor, Tensor)",
    cpu=_sample_cpu,
    cuda="token_logprobs.sample",
    fake=lambda x, t, s, p, theta: (s.new_empty(s.shape), x.new_empty(s.shape, dtype=torch.float32), s.new_empty(s.shape)),
    check=_sample_check,
)
