"""TRL's ways to train, each exact: every sampled token compared, none different, and nothing computed twice or left out."""

from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.utils import RepeatSampler

from rlinvariant.bits import assert_bits_equal
from rlinvariant.keys import KEYS
from rlinvariant.models import make_trainable
from rlinvariant.trainer import InvariantGRPOTrainer
from tests.parity.device import DEVICE, fp32_only_on_cpu
from tests.parity.harness import (
    Layout,
    assert_exact,
    assert_same_weights,
    fp32,
    new_trainer,
    questions,
    score,
    start_engine,
    train,
    weights,
)

STEP = 16 * 8  # tokens that a step compares at least: 16 completions of up to 12, of which a few end early
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo", "luspo")
TIMES = ("time/", "perf/", "step_time", "profiling/")  # what may differ from run to run


@pytest.fixture
def run(arithmetic_dir, exact_engine, tmp_path):
    """Train in exact mode; a directory of its own for each call."""

    def start(**changes):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        return train(arithmetic_dir, exact_engine, directory, **changes)

    return start


@pytest.fixture(scope="module")
def plain(arithmetic_dir, exact_engine, tmp_path_factory):
    """Two steps with every setting as in `new_trainer`: what others are compared with."""
    return train(arithmetic_dir, exact_engine, tmp_path_factory.mktemp("plain"))


def numbers(run, *but: str) -> list[dict]:
    """The rows without clocks, NaN written out so that it equals itself."""
    return [{k: repr(v) for k, v in row.items() if not k.startswith(TIMES) and k not in but} for row in run.rows]


def test_a_plain_run_is_exact_and_moves_the_weights(plain, arithmetic_dir):
    assert_exact(plain, 2 * STEP)
    before = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
    for name, p in before.named_parameters():
        if p.dim() == 1:
            continue  # norms are 1, where a step of the learning rate is less than an ulp of bf16
        moved = (p.bfloat16() != weights(plain)[name].bfloat16()).float().mean()
        assert moved > 0.05, f"{name}: a stale sampler would hardly be seen"
    for row in plain.rows:
        assert set(KEYS) <= row.keys() and row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"]
        assert row["onpolicy/kl_k3"] == 0 == row["onpolicy/weight_version_lag"] and row["onpolicy/is_ess"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_type_is_exact(loss, run):
    level = "sequence" if loss == "luspo" else "token"
    trained = run(loss_type=loss, importance_sampling_level=level)
    assert_exact(trained, 2 * STEP)
    assert all(torch.isfinite(p).all() for p in weights(trained).values())
    assert all(row["grad_norm"] > 0 for row in trained.rows)


# What else TRL may do with log-probs and entropies
SETTINGS = {
    "temperature 0.7": {"temperature": 0.7},
    "sequence ratios": {"importance_sampling_level": "sequence"},
    "two-sided clipping": {"delta": 2.0},
    "high entropy only": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.01},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "unbiased KL": {"temperature": 0.7, "beta": 0.1, "use_bias_correction_kl": True},
    "a reference that follows": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "rows padded to 8": {"pad_to_multiple_of": 8},
    "reentrant checkpointing": {"recompute": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_exact(setting, run):
    assert_exact(run(**SETTINGS[setting]), 2 * STEP)


SCHEDULES = {
    "in parts": {"tokens_per_microbatch": 60},
    "row by row": {"tokens_per_microbatch": 22},
    "one row of four at a time": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "two rollouts a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "two iterations": {"num_iterations": 2},
    "two iterations, in parts": {"num_iterations": 2, "gradient_accumulation_steps": 2, "tokens_per_microbatch": 60},
    "two iterations in one step": {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "scored ahead": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "scored ahead, two iterations": {"steps_per_generation": 2, "num_iterations": 2},
    "straddling a step": {"steps_per_generation": 2, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_compares_each_token_once(schedule, run):
    settings = {"per_device_train_batch_size": 8} | SCHEDULES[schedule]
    drawn: list[int] = []
    parts: list[int] = []
    generate, divide = InvariantGRPOTrainer._generate_single_turn, InvariantGRPOTrainer._divide

    def counted(self, *args, **kwargs):
        ids, logprobs = generate(self, *args, **kwargs)
        drawn.append(sum(map(len, ids)))
        return ids, logprobs

    def divided(self, batch):
        parts.append(len(found := divide(self, batch)))
        return found

    with (
        mock.patch.object(InvariantGRPOTrainer, "_generate_single_turn", counted),
        mock.patch.object(InvariantGRPOTrainer, "_divide", divided),
    ):
        trained = run(max_steps=4, **settings)
    assert min(parts) > 1 if "tokens_per_microbatch" in settings else set(parts) == {1}
    assert_exact(trained, 4 * len(drawn) * 8)  # 4 completions a rollout or more
    assert trained.total("compared_tokens") == sum(drawn), "what was sampled and what was compared are not the same"
    assert len(trained.rows) == 4


def test_reused_samples_count_as_older_weights(run):
    rows = run(num_iterations=2, max_steps=4).rows
    assert [row["onpolicy/weight_version_lag"] for row in rows] == [0, 1, 0, 1]
    assert [row["onpolicy/compared_tokens"] > 0 for row in rows] == [True, False, True, False]


def test_gradient_checkpointing_changes_no_bit(run, plain):
    again = run(recompute=True)
    assert again.trainer.fit.recomputed == again.trainer.fit.layers > 0 == plain.trainer.fit.recomputed
    assert numbers(again) == numbers(plain)
    assert_same_weights(weights(again), weights(plain), "gradient checkpointing")


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"])
def test_importance_sampling_correction_changes_no_bit(mode, run, plain):
    corrected = run(vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode)
    assert_exact(corrected, 2 * STEP)
    assert_same_weights(weights(corrected), weights(plain), mode)
    added = set(corrected.rows[0]) - set(plain.rows[0])  # TRL's own numbers about the correction
    assert numbers(corrected, *added) == numbers(plain)
    (ratio,) = {row[k] for row in corrected.rows for k in added if k.endswith("importance_sampling_ratio/mean")}
    assert ratio == 1.0


def test_evaluation_changes_no_sample(run):
    """It draws from seeds of its own. (TRL then shuffles a rollout by torch's generator, which loading data has moved.)"""

    def sampled(**changes):
        drawn, generate = [], InvariantGRPOTrainer._generate_single_turn

        def recording(self, *args, **kwargs):
            ids, logprobs = generate(self, *args, **kwargs)
            if self.model.training:
                drawn.append((ids, logprobs))
            return ids, logprobs

        with mock.patch.object(InvariantGRPOTrainer, "_generate_single_turn", recording):
            assert_exact(run(**changes), 2 * STEP)
        return drawn

    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": questions(8), "per_device_eval_batch_size": 16}
    assert sampled(**evaluated) == sampled()


def test_a_reference_model_is_the_same_function(run):
    """Policy and reference are one model at the first step: KL is 0 without rounding."""
    trained = run(beta=0.1)
    assert_exact(trained, 2 * STEP)
    assert trained.rows[0]["kl"] == 0.0 < trained.rows[1]["kl"]


def forwards(run_it) -> int:
    count = 0
    packed = InvariantGRPOTrainer._packed_logprobs

    def counted(self, *args):
        nonlocal count
        count += 1
        return packed(self, *args)

    with mock.patch.object(InvariantGRPOTrainer, "_packed_logprobs", counted):
        run_it()
    return count


def test_exact_mode_has_no_pass_for_old_log_probs(run):
    assert forwards(run) == 2, "one forward per step"
    assert forwards(lambda: run(vllm_importance_sampling_correction=True)) == 2
    assert forwards(lambda: run(num_iterations=2)) == 2
    # the rows of two steps are scored at once before the first of them trains on its own, and each again with gradients
    assert forwards(lambda: run(steps_per_generation=2)) == 1 + 2


def test_masters_and_gradients_are_fp32(run):
    seen: dict[str, torch.dtype] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({name: p.grad.dtype for name, p in model.named_parameters()})

    trained = run(max_steps=1, callbacks=[Look()])
    parameters = dict(trained.trainer.model.named_parameters())
    assert seen.keys() == parameters.keys() and set(seen.values()) == {torch.float32}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    finer = [name for name, p in parameters.items() if (p != p.bfloat16().float()).any()]
    assert finer == list(parameters), "masters were rounded to bf16"


def test_the_same_seed_gives_the_same_run(run, plain):
    again = run()
    assert numbers(again) == numbers(plain)
    assert_same_weights(weights(again), weights(plain), "second run")


def test_another_seed_gives_another_run(run, plain):
    assert numbers(run(seed=1))[0] != numbers(plain)[0]


@fp32_only_on_cpu
def test_two_dtypes_train(run, arithmetic_dir, tmp_path):
    """fp32 activations on both sides are exact too, and are not bf16 in disguise."""
    engine = start_engine(arithmetic_dir, dtype="float32")
    trained = train(arithmetic_dir, engine, tmp_path, dtype=torch.float32)
    assert_exact(trained, 2 * STEP)
    assert next(engine.model.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def saved(arithmetic_dir, exact_engine, tmp_path_factory):
    """Four steps, a checkpoint after the second and the last."""
    directory = tmp_path_factory.mktemp("saved")
    return train(arithmetic_dir, exact_engine, directory, max_steps=4, save_strategy="steps", save_steps=2), directory


def test_a_resumed_run_is_the_run_that_was_not_interrupted(saved, arithmetic_dir, exact_engine, tmp_path):
    whole, directory = saved
    rest = new_trainer(arithmetic_dir, exact_engine, tmp_path, max_steps=4)
    rest.trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert_exact(rest, 2 * STEP)
    streak = "onpolicy/exact_streak_tokens"  # counts from the start of a process
    counters = ("num_tokens",)  # of TRL, likewise
    assert numbers(rest, streak, *counters) == numbers(whole, streak, *counters)[2:]
    assert_same_weights(weights(rest), weights(whole), "resumed")


def test_a_checkpoint_loads_in_transformers_and_in_a_fresh_sampler(saved, exact_engine, arithmetic_dir):
    whole, directory = saved
    path = str(directory / "checkpoint-4")
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(model).__name__ == "Qwen3ForCausalLM" and type(model).__module__.startswith("transformers.")
    assert_same_weights(dict(model.named_parameters()), weights(whole), "loaded")
    engine, model = start_engine(path), model.to(DEVICE)
    assert engine.differing_weights(model.named_parameters()) == []
    prompts = [[1, 4 + i, 5] for i in range(8)]
    completions = engine.generate(prompts, range(8), temperature=0.7, max_tokens=12)
    scored = torch.cat(score(make_trainable(model), prompts, completions, 0.7, Layout(8)))
    assert_bits_equal(scored, torch.cat([fp32(c.sampler_logprobs) for c in completions]), "checkpoint")


def test_training_twice_syncs_again(arithmetic_dir, exact_engine, tmp_path):
    """A second `train` starts at step 0 with other weights than the first one did."""
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, max_steps=1)
    run.trainer.train()
    run.trainer.train()
    assert_exact(run, 2 * STEP)
    assert len(run.rows) == 2


@pytest.mark.parametrize("generations", [{}, {"gradient_accumulation_steps": 1, "steps_per_generation": 2}])
def test_a_step_whose_completions_are_all_masked_is_compared(generations, arithmetic_dir, exact_engine, tmp_path):
    """Nearly all completions are cut at two tokens: parts of a step have no token to train on."""
    masked = {"mask_truncated_completions": True, "max_completion_length": 2, "per_device_train_batch_size": 4, **generations}
    run = train(arithmetic_dir, exact_engine, tmp_path, **masked, tokens_per_microbatch=16)
    assert_exact(run, 12)
    assert run.total("masked_tokens") >= 0.8 * run.total("compared_tokens")


def test_the_sampler_of_trl_repeats_each_prompt_in_place():
    """The order on which `_seeds` and `group_unique_frac` rely: all samples of a prompt stand together."""
    order = list(RepeatSampler(list(range(6)), mini_repeat_count=3, batch_size=2, repeat_count=1, seed=0))
    assert all(len(set(order[i : i + 3])) == 1 for i in range(0, 18, 3)) and len(set(order)) == 6
