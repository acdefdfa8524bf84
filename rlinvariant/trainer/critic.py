"""PPO's critic: a Hugging Face decoder with a scalar head, exact where the policy is, saved as a model or as adapters."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rlinvariant import ops
from rlinvariant.errors import UserError
from rlinvariant.models import adapter_files, audit_config, lora, make_trainable, require_exact, shards
from rlinvariant.models.graphs import hidden_states, runs_as_graphs
from rlinvariant.models.load import load
from rlinvariant.trainer.memory import decoder_layers
from rlinvariant.trainer.packing import Sizes, pack
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_HEAD_FILE = "value_head.safetensors"
FOREIGN_HEADS = ("lm_head.", "score.")  # in the checkpoint of a causal LM or a reward model: a critic leaves them out


class Critic(nn.Module):
    """Gives a value to every prefix that a token is sampled after: a Hugging Face decoder, and a scalar head that starts at 0.

    Args:
        backbone: a decoder without lm_head, on its device; patched in place. Its parameters are fp32, or frozen beside
            adapters that are.
        dtype: what activations, and so values, are computed in where invariant.
        invariant: run through `ops`, packed; else the stock forward, padded, under autocast, as TRL runs the policy.
        shards_on: the device where each process keeps a shard of every weight of the backbone, which is on the host; None:
            each has it whole.
        adapter: the `peft.LoraConfig` of the backbone's adapters; None: it has none, and all of it is trained.

    Bits: where invariant, a value depends on the tokens before it alone: not on micro-batch, order of rows or padding.
    """

    def __init__(
        self,
        backbone: "PreTrainedModel",
        dtype: torch.dtype,
        invariant: bool,
        shards_on: torch.device | None = None,
        adapter: Untyped = None,
    ) -> None:
        super().__init__()
        self.invariant, self.adapter = invariant, adapter
        if shards_on is not None:
            audit_config(backbone.config, dtype, shards_on, sharded=True)
            shards.shard(make_trainable(backbone, dtype, shards_on), decoder_layers(backbone))
        elif invariant:
            make_trainable(backbone, dtype)
        self.backbone = backbone
        weight = next(weight for weight in backbone.parameters() if weight.requires_grad)
        self.head = nn.Linear(backbone.config.hidden_size, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        if invariant and shards_on is None:
            self._require_exact()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, length: int, sizes: Sizes | None = None) -> Tensor:
        """Return [B, length] fp32: the value before each of the last `length` tokens, 0 where there is no token.

        Args:
            input_ids, attention_mask: [B, L], as for `pack`; length: how many of the last columns are completions.
            sizes: as for `pack`.
        """
        if not self.invariant:
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            values = self.head(hidden[:, -length - 1 : -1].to(self.head.weight.dtype))[..., 0].float()
            return values.masked_fill(attention_mask[:, -length:] == 0, 0.0)
        batch = pack(input_ids, attention_mask, length, few_shapes=runs_as_graphs(self.backbone), sizes=sizes)
        hidden = hidden_states(self.backbone, **batch.inputs, attention_mask=None)
        values = ops.linear(hidden[0, batch.predicted_from], self.head.weight)
        return batch.unpack(values[:, 0].float())

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and parameters of the backbone that are saved: all, or its adapters, as PEFT names a causal LM's."""
        if self.adapter is None:
            yield from self.backbone.named_parameters()
        else:
            at = f"base_model.model.{self.backbone.base_model_prefix}"
            yield from ((f"{at}.{name}", weight) for name, weight in lora.trained(self.backbone))

    def save(self, directory: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write a Hugging Face model directory, or PEFT's, and the head beside it; `state` is what `saved` yields, gathered."""
        if self.adapter is None:
            self.backbone.save_pretrained(directory, state_dict=state)
        else:
            adapter_files.write(directory, self.adapter, dict(self.saved()) if state is None else state)
        save_file({"weight": self.head.weight.detach().cpu().contiguous()}, directory / VALUE_HEAD_FILE)

    def load(self, directory: Path) -> None:
        """Take over what `save` wrote, in place.

        Raises:
            UserError: the directory has no critic, or one that cannot be loaded whole.
        """
        if not (directory / VALUE_HEAD_FILE).is_file():
            why = "the checkpoint has no critic, it is not one of PPO; start a new run"
            raise UserError(f"{directory}: no {VALUE_HEAD_FILE}: {why}")
        if self.adapter is not None:
            shards.load_adapter(self.saved(), directory)
        elif shards.is_sharded(self.backbone):
            shards.load(self.backbone, directory)
        else:
            saved = load(AutoModel, directory, "critic", dtype=torch.float32)
            self.backbone.load_state_dict(saved.state_dict())
        self.load_head(directory)

    def load_head(self, directory: Path) -> None:
        """Take over the head that `save` wrote, if there is one."""
        if not (directory / VALUE_HEAD_FILE).is_file():
            return
        with torch.no_grad():
            self.head.weight.copy_(load_file(directory / VALUE_HEAD_FILE)["weight"])

    def _require_exact(self) -> None:
        """Raise UnsupportedModel unless every operation on the way to a value is owned."""
        device = self.head.weight.device
        ids = torch.arange(10, device=device).view(2, 5) % self.backbone.config.vocab_size
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        inputs = pack(ids, mask, 3).inputs
        require_exact(self.backbone, lambda: self.backbone(**inputs, attention_mask=None, use_cache=False), "critic")


def beside(model: Untyped, shared: bool) -> "PreTrainedModel":
    """Return a copy of a policy's decoder for a critic: of one with adapters those are copied, and the frozen base is not.

    Args:
        model: the policy, PEFT's or not.
        shared: whether the two may have a base in common; False: it is copied, too.
    """
    frozen = lora.base(model) if hasattr(model, "peft_config") and shared else ()
    return copy.deepcopy(lora.without_peft(model).base_model, {id(weight): weight for _, weight in frozen})


def load_critic(path: str, policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """Load the decoder of a Hugging Face checkpoint, fp32, for a critic to start from.

    Raises:
        UserError: it cannot be loaded whole, or reads other tokens than the policy writes.
    """
    backbone = load(AutoModel, path, "ppo.critic", FOREIGN_HEADS, dtype=torch.float32)
    ours, theirs = policy.config.vocab_size, backbone.config.vocab_size
    if ours != theirs:
        raise UserError(f"ppo.critic={path}: expected the policy's vocabulary of {ours} tokens, found {theirs}; choose another")
    if tokenizer is not None and _has_tokenizer(path):
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab()
        if found != tokenizer.get_vocab():
            raise UserError(f"ppo.critic={path}: expected the policy's tokenizer, found another vocabulary; choose another")
    return backbone


def _has_tokenizer(path: str) -> bool:
    return (Path(path) / "tokenizer.json").is_file() or not Path(path).is_dir()
