"""Memory that is too small: a step begins again in smaller parts and changes nothing else, or the run ends in one line."""

import re

import pytest
import torch
from peft import LoraConfig

from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.models import lora, make_invariant
from rlinvariant.trainer import InvariantGRPOTrainer, memory
from rlinvariant.trainer.critic import Critic
from rlinvariant.trainer.memory import Fit
from tests.models.small import SUPPORTED, build
from tests.parity.harness import assert_exact, assert_same_weights, new_trainer, train, weights
from tests.trainer.test_microbatches import TWICE
from tests.trainer.test_training import STEP, numbers


def out_of_memory(monkeypatch, **at):
    """Let calls of the step's forwards end as where a GPU's memory is too small: in it, or in the backward that follows.

    Args:
        at: forward=, backward=: which call, counted from 0.
    """
    calls, packed = [], InvariantGRPOTrainer._packed_logprobs

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def limited(self, model, *args):
        if not torch.is_grad_enabled():
            return packed(self, model, *args)
        calls.append(len(calls))
        logprobs, entropies = packed(self, model, *args)  # a part of the work is done by then
        if calls[-1] == at.get("forward"):
            fail()
        if calls[-1] == at.get("backward"):  # other gradients of this part have been added already
            first = next(iter(self.accelerator.unwrap_model(model).parameters()))
            hook = first.register_post_accumulate_grad_hook(lambda _: (hook.remove(), fail()))
        return logprobs, entropies

    monkeypatch.setattr(InvariantGRPOTrainer, "_packed_logprobs", limited)
    return calls


RETAKEN = {
    "a rollout a step": ({}, 1),
    "two rollouts a step": ({"per_device_train_batch_size": 8, **TWICE["two rollouts a step"]}, 3),
    "straddling a step": ({"per_device_train_batch_size": 8, **TWICE["straddling a step"]}, 3),
    "used twice": ({"num_iterations": 2}, 1),
    "an entropy bonus that adapts": ({"use_adaptive_entropy": True, "entropy_target": 9.0, "loss_type": "dapo"}, 1),
    "a reference": ({"beta": 0.1}, 2),
    "PPO": ({"ppo": PPOConfig()}, 1),
}


@pytest.mark.parametrize("name", RETAKEN)
def test_out_of_memory_starts_the_step_again_with_half_the_tokens_and_changes_nothing_else(name, divided, monkeypatch, capsys):
    """Memory ends in the forward of a later part, or of the second batch of a step, and when the step is taken again in the
    backward of one later still: what was added before is taken back, twice.
    """
    settings, call = RETAKEN[name]
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cpu", 16)
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cuda", 16)
    expected, gradients = divided(30, max_steps=2, **settings)
    calls = out_of_memory(monkeypatch, forward=call, backward=2 * call + 2)
    run, found = divided(120, max_steps=2, **settings)
    assert len(calls) > 2 * call + 2
    said = capsys.readouterr().out
    for tokens in (120, 60):
        assert f"step 1: out of memory with micro-batches of at most {tokens} tokens" in said
    assert said.count("the step starts again with") == 2
    assert run.trainer.fit.tokens == 30
    assert_exact(run, STEP)
    assert torch.equal(found, gradients), "the first step is not what it is with 30 tokens from the start"
    for a, b in zip(numbers(run), numbers(expected), strict=True):
        assert {k: (a[k], b[k]) for k in a if a[k] != b[k]} == {}
    assert_same_weights(weights(run), weights(expected), "out of memory")


def test_out_of_memory_in_the_critics_pass_of_a_rollout_halves_too(divided, monkeypatch, capsys):
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cpu", 16)
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cuda", 16)
    expected, gradients = divided(200, max_steps=2, ppo=PPOConfig())
    forward, calls = Critic.forward, []

    def limited(self, *args):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args)

    monkeypatch.setattr(Critic, "forward", limited)
    run, found = divided(400, max_steps=2, ppo=PPOConfig())
    assert calls[:3] == [True, False, False], "with the graph, and then in two parts without"
    assert "the critic's pass starts again with micro-batches of at most 200 tokens" in capsys.readouterr().out
    assert torch.equal(found, gradients) and numbers(run) == numbers(expected)


def test_a_resume_keeps_what_memory_has_halved(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cpu", 16)
    monkeypatch.setitem(memory.ENOUGH_TOKENS, "cuda", 16)
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "tokens_per_microbatch": 120}
    with monkeypatch.context() as patch:
        out_of_memory(patch, forward=1)
        whole = train(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    again = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert again.trainer.fit.tokens == 60
    assert_same_weights(weights(again), weights(whole), "resumed")


@pytest.mark.parametrize("recomputes", [True, False])
def test_what_is_tried_as_memory_gets_smaller(recomputes):
    found, fit = [], Fit(32768, 0, 28)
    while fit is not None:
        found.append((fit.tokens, fit.recomputed))
        fit = fit.halved(3000, "cuda", recomputes)
    smaller = [(8192, 28), (4096, 28), (3000, 28)] if recomputes else [(4096, 0), (3000, 0)]
    assert found == [(32768, 0), (16384, 0), (8192, 0), *smaller]


def test_a_host_waits_longer_for_layers_with_adapters():
    model = build("llama")
    layers = memory.decoder_layers(model)
    tokens = int(memory.HOST_BOUND * len(layers) / sum(p.numel() for layer in layers for p in layer.parameters()))
    assert memory._waits_for_host(model, tokens - 1) and not memory._waits_for_host(model, tokens + 1)
    adapted = lora.applied(model, LoraConfig(r=1, target_modules=["q_proj"]), 0)
    assert memory._waits_for_host(adapted, 2 * tokens) and not memory._waits_for_host(adapted, 3 * tokens)


def test_out_of_memory_for_one_row_is_one_line_that_says_what_was_tried(divided, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(InvariantGRPOTrainer, "_packed_logprobs", never)
    with pytest.raises(UserError) as error:
        divided(60, recompute=None, gradient_checkpointing=True)
    assert re.fullmatch(
        r"step 1: out of memory with micro-batches of at most \d+ tokens, activations of all layers recomputed; "
        r"the longest row has \d+ tokens; lower tokens_per_microbatch or .*: CUDA out of memory.*",
        str(error.value),
    )


PLACES = {  # where else memory may be too small in the second step, and what the line says of it
    "clipping": (
        torch.nn.utils,
        "clip_grad_norm_",
        "out of memory in the optimizer; lower sampler.kv_cache_gib, choose an optim ",
    ),
    "optimizer": (torch.optim.AdamW, "step", "out of memory in the optimizer; lower sampler.kv_cache_gib, choose an optim "),
    "weight sync": (InvariantGRPOTrainer, "sync", "out of memory before a pass; lower sampler.kv_cache_gib"),
    "log": (InvariantGRPOTrainer, "_hand_on_samples", "out of memory outside of a pass; lower sampler.kv_cache_gib"),
}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_elsewhere_is_one_line_and_loses_no_step_before(
    place, arithmetic_dir, exact_engine, tmp_path, monkeypatch
):
    owner, name, words = PLACES[place]
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = train(arithmetic_dir, exact_engine, tmp_path / "whole", **settings)
    broken = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    works = getattr(owner, name)

    def fails(*args, **kwargs):
        if broken.trainer.state.global_step >= 1 and (place != "log" or broken.trainer.state.global_step == 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return works(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(owner, name, fails)
        broken.trainer.train()
    said = str(error.value)
    assert "\n" not in said and re.match(rf"step [23]: {words}", said) and "checkpoint-1 is the last: CUDA out of" in said
    again = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    again.trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights(again), weights(whole), "resumed")


@pytest.mark.parametrize("call", [0, 1], ids=["first", "second"])
def test_out_of_memory_in_a_rollout_takes_no_step_without_it(call, divided, monkeypatch):
    """Also where the step has trained on another rollout already, which is not trained on alone."""
    calls, generate = [], InvariantGRPOTrainer._generate_single_turn

    def limited(self, *args, **kwargs):
        calls.append(len(calls))
        if calls[-1] == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(InvariantGRPOTrainer, "_generate_single_turn", limited)
    with pytest.raises(UserError, match=r"step 1: out of memory before a pass; lower .*: CUDA out of memory"):
        divided(None, per_device_train_batch_size=8, **TWICE["two rollouts a step"])
    assert len(calls) == call + 1


def test_a_resumed_run_divides_as_its_checkpoint_did(arithmetic_dir, exact_engine, tmp_path, capsys):
    """Whatever now fits: the settled number is part of the run."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    whole.trainer._fit = Fit(60, 0, 2)
    whole.trainer.train()
    again = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", **settings)
    assert again.trainer.fit.tokens != 60
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert again.trainer.fit.tokens == 60
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batches")]
    assert said == 2 * ["micro-batches of at most 60 tokens, no activations recomputed"], "once for each of two runs"
    assert_same_weights(weights(again), weights(whole), "resumed")
    asked = new_trainer(arithmetic_dir, exact_engine, tmp_path / "a", tokens_per_microbatch=99, **settings)
    asked.trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert asked.trainer.fit.tokens == 99, "the user's own number is another run, and is what was asked for"


def test_more_is_recomputed_and_then_less_is_held_as_memory_shrinks(divided, monkeypatch):
    run, _ = divided(None)
    trainer, layers = run.trainer, run.trainer.fit.layers
    trainer.recompute, found = None, []
    token = memory._bytes_of_a_token(trainer.model)
    whole = token * (layers + memory.BACKWARD) / layers
    for tokens_that_fit in (1e6, 8192 * 1.2, 8192 * 0.9, 1024 * 0.9, 100.0, 1.5):
        monkeypatch.setattr(memory, "_usable", lambda _, n=tokens_that_fit: n * whole)
        found.append(memory.settle(trainer))
    assert found[0] == found[1] == Fit(8192, 0, layers) and found[2] == Fit(4096, 0, layers)
    assert found[3].tokens == 1024 and 0 < found[3].recomputed <= layers
    assert found[4] == found[5] == Fit(256, layers, layers), "a longer row is a part of its own"
    assert [fit.tokens for fit in found] == sorted((fit.tokens for fit in found), reverse=True)
    assert all(fit.tokens & (fit.tokens - 1) == 0 for fit in found), "a run on a card with a little more memory is another run"


@pytest.mark.parametrize("gradients", ["stock", "invariant"])
def test_whole_gradients_are_counted_where_weights_are_in_shards(gradients, divided, monkeypatch):
    """A step of several parts keeps them whole until the last, on every rank; so does a tree keep all that it holds."""
    run, _ = divided(None, gradients=gradients)
    trainer, parameters = run.trainer, sum(p.numel() for p in run.trainer.model.parameters())
    monkeypatch.setattr(memory, "_all_memory", lambda: 1.1 * (3 * memory.CHUNK_BYTES["cpu"] + 24 * parameters))
    whole = memory._usable(trainer)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert trainer.sharded and whole - memory._usable(trainer) == pytest.approx(4 * parameters)


def test_what_a_forward_keeps_is_what_is_counted(divided):
    """Twice the layers keep twice as much; recomputed ones keep their input alone, which is not asked for here."""
    run, _ = divided(None)
    model = run.trainer.model
    whole = memory._bytes_of_a_token(model)
    layers, model.model.layers = model.model.layers, model.model.layers[:1]
    one = memory._bytes_of_a_token(model)
    model.model.layers = layers
    config = model.config
    least = 2 * (4 * config.hidden_size + 3 * config.intermediate_size)  # bf16: streams, norms, gate, up and their product
    assert whole - one >= least * (len(layers) - 1)
    assert whole - one <= 4 * least * (len(layers) - 1)


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("positions", [7, 20, 64])
def test_a_model_with_few_positions_is_measured(family, positions):
    """The probe is as many tokens for every model; its rows end where the positions do, and a row past them is an error."""
    few, many = (make_invariant(build(family, max_position_embeddings=n)).train() for n in (positions, 128))
    found = [memory._bytes_of_a_token(model) for model in (few, many)]
    assert found[0] == pytest.approx(found[1], rel=0.05), "cumulative lengths alone differ"
