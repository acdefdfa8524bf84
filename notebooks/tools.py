"""The notebooks share these: a tiny random model, a server in a few lines, how pictures look. Nothing here is the library's.

Import it first: some of this must be set before torch is imported.
"""

# ruff: noqa: E402
import os
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm would like ipywidgets
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # by transformers 5.24, which says `cache`
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve each other on a machine that is shared
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM says where it allocates

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from rlinvariant import ops, runtime

runtime.quiet()
logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)  # quicker for models this small; and whatever varies here cannot be blamed on threads
STOCK, OURS, GREY = "#c2571a", "#12766f", "#8a8f98"  # the colours of the two arms, and of what belongs to neither
plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.figsize": (8, 3.2),
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


def tiny_model(dtype: torch.dtype = torch.bfloat16, vocabulary: int = 512) -> Qwen3ForCausalLM:
    """A stock Qwen3 of Hugging Face with random weights, the same at every call: 4 layers, 128 wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=3072,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.15,
        )
        return Qwen3ForCausalLM(config).to(dtype).eval()


def requests(count: int, length: int = 8) -> Tensor:
    """[count, length] random token ids: prompts of as many users."""
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def serve(model, prompts: Tensor, tokens: int, choose: Callable[[Tensor, int], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Decode requests together, one token of each at a time over a key-value cache: what a server does.

    Args:
        prompts: [B, T] token ids, each row a request.
        tokens: how many to decode.
        choose: (logits [B, V] fp32, step) -> token ids [B]; by default the likeliest token, temperature 0.

    Returns:
        (token ids [B, tokens], logits [B, tokens, V] fp32 that they were chosen from).
    """
    if model.config._attn_implementation == "rlinvariant":
        model.set_attn_implementation("rlinvariant_paged")
    cache, ids, chosen, logits = DynamicCache(config=model.config), prompts, [], []
    for step in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1].float())
        ids = (logits[-1].argmax(-1) if choose is None else choose(logits[-1], step))[:, None]
        chosen.append(ids)
    return torch.cat(chosen, 1), torch.stack(logits, 1)


def _paged(module, q: Tensor, k: Tensor, v: Tensor, attention_mask, scaling=None, **kwargs):
    """Our attention over a key-value cache, as vLLM's side calls it; here each request has one page, as long as it is."""
    b, _, t, d = q.shape
    pages, table = torch.cat([k, v], -1), torch.arange(b, dtype=torch.int32)[:, None]
    starts, lengths = torch.arange(0, b * t + 1, t, dtype=torch.int32), torch.full((b,), k.shape[2], dtype=torch.int32)
    scale = d**-0.5 if scaling is None else scaling
    out = ops.paged_attention(q.transpose(1, 2).flatten(0, 1), pages, table, starts, lengths, scale)
    return out.view(b, t, *out.shape[1:]), None


AttentionInterface.register("rlinvariant_paged", _paged)
