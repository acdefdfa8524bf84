"""Models of known shapes with random weights: there is no hub to load them from, and speed and bits need no more.

`build("qwen3-1.7b", directory)` saves one, with a tokenizer that has a word for every token: w0, w1, ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant.runtime import random_state_kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shape:
    """Describes a decoder. `kind` says which of transformers' models has it. Of a mixture, `mlp` is the width of an expert."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    kind: str
    experts: int = 0
    experts_per_token: int = 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return [N, K] of the weights of `ops.linear`; q, k, v are merged, and gate, up, as vLLM merges them."""
        q = self.heads * self.head_dim
        dense = {"gate_up": (2 * self.mlp, self.hidden), "down": (self.hidden, self.mlp)}
        return {
            "qkv": (q + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, q),
            **({"router": (self.experts, self.hidden)} if self.experts else dense),
            "lm_head": (self.vocab, self.hidden),
        }


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152, True, "llama"),
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, True, "qwen3"),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8, 128, 151936, True, "qwen3"),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, 128, 151936, True, "qwen3"),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, False, "qwen3"),
    "qwen3-8b-half": Shape(4096, 12288, 18, 32, 8, 128, 151936, False, "qwen3"),  # whole, its training needs 164 GB
    "qwen3-32b-half": Shape(5120, 25600, 32, 64, 8, 128, 151936, False, "qwen3"),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936, True, "qwen2"),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 128, 151936, True, "qwen2"),
    "qwen2.5-3b": Shape(2048, 11008, 36, 16, 2, 128, 151936, True, "qwen2"),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True, "llama"),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, True, "llama"),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
    "qwen3-30b-a3b-quarter": Shape(2048, 768, 12, 32, 4, 128, 151936, False, "qwen3_moe", 128, 8),
    "tiny": Shape(256, 512, 2, 2, 1, 128, 1024, True, "qwen3"),
    "tiny-moe": Shape(256, 128, 2, 2, 1, 128, 1024, True, "qwen3_moe", 8, 2),
}
POSITIONS = {"qwen3": 40960, "qwen3_moe": 40960, "qwen2": 32768, "llama": 131072}
EPS = {"qwen3": 1e-6, "qwen3_moe": 1e-6, "qwen2": 1e-6, "llama": 1e-5}
ROPE: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_type": "default", "rope_theta": 1e6},
    "qwen3_moe": {"rope_type": "default", "rope_theta": 1e6},
    "qwen2": {"rope_type": "default", "rope_theta": 1e6},
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def config(name: str) -> "PreTrainedConfig":
    """Return transformers' configuration of a model of `SHAPES`."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    s = SHAPES[name]
    kind = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "qwen2": Qwen2Config, "llama": LlamaConfig}[s.kind]
    more: dict[str, Any] = {} if s.kind == "qwen2" else {"head_dim": s.head_dim}
    if s.experts:
        sizes = {"num_experts": s.experts, "num_experts_per_tok": s.experts_per_token, "moe_intermediate_size": s.mlp}
        more |= {**sizes, "norm_topk_prob": True, "router_aux_loss_coef": 0.0}
    return kind(
        hidden_size=s.hidden,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        vocab_size=s.vocab,
        tie_word_embeddings=s.tied,
        rms_norm_eps=EPS[s.kind],
        max_position_embeddings=POSITIONS[s.kind],
        rope_parameters=dict(ROPE[s.kind]),
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **more,
    )


def build(name: str, directory: str | Path, stops: int = 1) -> str:
    """Save a bf16 model with random weights, std 0.02, in `directory`, unless one is there; made on the GPU if there is one.

    Biases and the weights of norms are random too, or a comparison of bits would not see them. A completion ends at any of
    `stops` tokens: the model draws nearly evenly from its vocabulary. Returns the directory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    if (directory / "config.json").exists():
        return str(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with random_state_kept(), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(name), dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
        # transformers leaves this row zero, where a norm's gradient is 1 / sqrt(eps): over many layers it overflows
        model.get_input_embeddings().weight[model.config.pad_token_id].normal_(0.0, 0.02)
    model.generation_config.eos_token_id = [1, *range(3, 2 + stops)] if stops > 1 else 1
    model.save_pretrained(directory, max_shard_size="5GB")  # a shard goes through the host's memory, twice
    tokenizer(SHAPES[name].vocab).save_pretrained(directory)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return str(directory)


def tokenizer(vocabulary: int) -> "PreTrainedTokenizerBase":
    """Return a tokenizer with one word for each token: w0, w1, ..."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    bos, eos, pad = (AddedToken(f"w{i}", single_word=True, special=True) for i in range(3))  # or w25 would be w2, 5
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos, pad_token=pad)
