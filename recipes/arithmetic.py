"""Column addition, learned in minutes on two CPU cores: prompt `348+275=`, completion `8+5+0=13,4+7+1=12,3+2+1=06;623`.

Each column is written as digit + digit + carry = two digits, units first; the answer follows the semicolon. A small
Qwen3 with a character tokenizer is taught the form by a supervised stage that stops early, and GRPO does the rest.
"""

import json
import random
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.warmstart import warm_start

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = {
    "steps": 120,
    "trainer.learning_rate": 6e-4,
    "trainer.adam_beta2": 0.99,  # a run of 120 steps is short for 0.999
    "trainer.warmup_steps": 10,
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 128,  # 16 prompts x 8 samples
    "trainer.max_completion_length": 48,
    "trainer.loss_type": "dapo",
    "trainer.gradient_checkpointing": False,  # the model is small
    "sampler.max_model_len": 128,
    "sampler.max_num_seqs": 128,
    "sampler.kv_cache_gib": 0.5,
}


@chz.chz
class Data(BaseData):
    digits: int = chz.field(default=3, doc="Digits of each operand.")
    train_size: int = chz.field(default=8192, doc="Training prompts.")
    eval_size: int = chz.field(default=256, doc="Held-out prompts; no sum of theirs, in either order, is trained on.")
    seed: int = chz.field(default=0, doc="Of the operands and of the supervised stage.")
    path: str | None = chz.field(default=None, doc="JSON lines with `prompt` and `answer` in place of drawn training sums.")


def check(config: Config) -> list[str]:
    data, errors = config.data, []
    for key, least, most in (
        ("digits", 1, 6),
        ("train_size", 1, 10**7),
        ("eval_size", 1, 10**5),
        ("seed", 0, 2**32 - 1),
    ):
        value = getattr(data, key)
        if not least <= value <= most:
            errors.append(f"data.{key}={value}: expected {least} to {most}")
    if not errors and data.eval_size > 0.1 * (9 * 10 ** (data.digits - 1)) ** 2 / 2:
        errors.append(f"data.eval_size={data.eval_size}: too many for data.digits={data.digits}; lower one or raise the other")
    if data.path is not None and not Path(data.path).is_file():
        errors.append(f"data.path={data.path}: no such file; give a JSON lines file with `prompt` and `answer`")
    elif data.path is not None:
        with open(data.path) as file:
            first = file.readline()
        if not first.lstrip().startswith("{") or missing_columns(first):
            errors.append(f"data.path={data.path}, line 1: expected a JSON object with `prompt` and `answer`")
    return errors


def missing_columns(line: str) -> bool:
    try:
        return not {"prompt", "answer"} <= json.loads(line).keys()
    except json.JSONDecodeError:
        return True


def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
    from datasets import Dataset, load_dataset

    held_out = held_out_pairs(config)
    evaluation = Dataset.from_list([_row(pair) for pair in sorted(held_out)])
    if config.data.path is not None:
        train = load_dataset("json", data_files=config.data.path, split="train")
        if "answer" not in train.column_names:
            raise UserError(f"data.path={config.data.path}: no `answer`; columns found: {', '.join(train.column_names)}")
        return train, evaluation
    generator = random.Random(f"train {config.data.seed}")
    train = [_row(_training_pair(generator, config.data.digits, held_out)) for _ in range(config.data.train_size)]
    return Dataset.from_list(train), evaluation


def exact_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right sum after the last semicolon, else 0."""
    return [float(text.rpartition(";")[2] == right) for text, right in zip(completions, answer, strict=True)]


def reward_funcs(config: Config) -> list[Any]:
    return [exact_answer]


def prepare_model(config: Config) -> str:
    held_out, digits = held_out_pairs(config), config.data.digits

    def example(generator: random.Random) -> tuple[str, str]:
        a, b = _training_pair(generator, digits, held_out)
        return f"{a}+{b}=", worked_sum(a, b)

    return warm_start(
        "arithmetic",
        build_model,
        example,
        key={"digits": digits, "eval_size": config.data.eval_size},
        stop_at=0.3,
        max_steps=800,
        batch_size=32,
        learning_rate=3e-3,
        seed=config.data.seed,
    )


def worked_sum(a: int, b: int) -> str:
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(columns) + f";{a + b}"


def held_out_pairs(config: Config) -> set[tuple[int, int]]:
    """`eval_size` operand pairs, the smaller operand first."""
    generator, pairs = random.Random(f"eval {config.data.seed}"), set()
    while len(pairs) < config.data.eval_size:
        a, b = _pair(generator, config.data.digits)
        pairs.add((min(a, b), max(a, b)))
    return pairs


def build_tokenizer() -> Any:
    """One token per printable ASCII character, `<pad>`, `<bos>` (put before every prompt), `<eos>` and `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer


def _pair(generator: random.Random, digits: int) -> tuple[int, int]:
    low, high = 10 ** (digits - 1), 10**digits - 1
    return generator.randint(low, high), generator.randint(low, high)


def _training_pair(generator: random.Random, digits: int, held_out: set[tuple[int, int]]) -> tuple[int, int]:
    while True:
        a, b = _pair(generator, digits)
        if (min(a, b), max(a, b)) not in held_out:
            return a, b


def _row(pair: tuple[int, int]) -> dict[str, str]:
    a, b = pair
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}
