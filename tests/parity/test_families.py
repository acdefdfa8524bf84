"""Every family, from a tiny random configuration: sampler and trainer have the same bits, and both are right."""

import copy
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from rlinvariant.bits import compare
from rlinvariant.models import UnsupportedModel, make_invariant, make_trainable, require_exact, unsupported
from rlinvariant.models.families import FAMILIES, REFUSED, VOCABULARY
from rlinvariant.models.random import save_random
from rlinvariant.sampler.engine import Sampler
from rlinvariant.verification.load import trained
from tests.parity.device import DEVICE, cpu_only
from tests.parity.harness import Layout, Pair, Request, assert_same_completions, drive, fp32, score, start_engine

LENGTHS = (1, 2, 17, 33, 39, 40, 41, 64, 65, 100, 129, 150)  # about the window of 40, pages of 16 and 32, and chunks of 64
TOKENS = 16
# tests/verification draws from every family; here are those whose windows leave pages behind, in some layers or in all
WINDOWED = ("qwen2-window", "mistral-window", "gemma3")
NAMED = {  # what a refusal says
    "gpt-oss": "GptOssForCausalLM cannot run exactly: model_type=gpt_oss: no op has its experts",
    "deepseek": "n_group=2: no op has experts in groups; .*routed_scaling_factor=2.5",
    "glm-moe": "Glm4MoeForCausalLM cannot run exactly: n_group=1: .*n_shared_experts=1: no op has experts that every token",
    "qwen2-moe": "shared_expert_intermediate_size=64: no op has an expert that every token goes to, behind a gate",
    "mixtral, jitter": "router_jitter_noise=0.1: no op has noise",
    "gpt2": "GPT2LMHeadModel cannot run exactly: no rule in models/patch.py has its Conv1D, LayerNorm$",
    # interleaved rotary columns
    "cohere": "CohereForCausalLM cannot run exactly: CohereAttention looks like Attention but differs",
    "qwen3, dynamic rope": "rope_type=dynamic",
    "llama, dropout": "attention_dropout=0.1",
}
# What a family has of its own: without it, it is another model, or the comparison with transformers would not see a mistake
OWN: dict[str, dict[str, Any]] = {
    "qwen2-window": {"window": None},
    "qwen3-window": {"window": None},
    "mistral-window": {"window": None},
    "phi3-window": {"window": None},
    "granite": {"scaling": 0.125},
    "smollm3": {"rotated": True},
    "gemma2": {"softcap": None},
    "gemma3": {"offset": 0.0},
    "olmoe": {"renormalise": True},
}


class Family(Pair):
    def mismatched(self, model: Any, temperature: float, layout: Layout) -> int:
        """Tokens whose log-probs differ in a bit, of all that were drawn."""
        completions = self.completions(temperature)
        scored = torch.cat(score(model, self.prompts, completions, temperature, layout))
        sampled = torch.cat([fp32(c.sampler_logprobs) for c in completions])
        assert len(scored) == sum(len(c.token_ids) for c in completions) > TOKENS * len(LENGTHS) // 2
        return int((scored.view(torch.int32) != sampled.view(torch.int32)).sum())


def load(path: str) -> Any:
    """Load a model in fp32 with transformers' eager attention, as its other kinds of attention leave caps of scores out."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").to(DEVICE).eval()


@pytest.fixture(scope="module", params=WINDOWED)
def family(request, tmp_path_factory) -> Family:
    path = save_random(FAMILIES[request.param](), tmp_path_factory.mktemp("models") / request.param)
    engine = start_engine(path, max_num_batched_tokens=64)  # so that prompts come in chunks
    # Where a window has left a page behind, vLLM puts page 0 in its place: nobody may read it
    for layer in engine._runner.compilation_config.static_forward_context.values():
        layer.kv_cache[0].fill_(float("nan"))
    return _family(path, engine)


def _family(path: str, engine: Sampler) -> Family:
    model = make_trainable(load(path), torch.bfloat16)
    require_exact(model)
    rng = random.Random(1)
    return Family(path, engine, model, [[rng.randrange(VOCABULARY) for _ in range(n)] for n in LENGTHS], TOKENS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_matches_sampler(family, temperature):
    for layout in (Layout(5, "shuffled", padding=2), Layout(len(LENGTHS), "reversed", grad=True)):
        assert family.mismatched(family.model, temperature, layout) == 0, layout


def test_weights_one_ulp_off_do_not_match(family):
    """Control: the smallest change that the weights of one norm can have."""
    model = copy.deepcopy(family.model)
    with torch.no_grad():
        weight = model.base_model.norm.weight
        weight[:] = torch.nextafter(weight.bfloat16(), torch.tensor(9.0, dtype=torch.bfloat16, device=DEVICE)).float()
    assert family.mismatched(model, 1.0, Layout(5)) > 0


def test_a_request_alone_is_the_same_request_in_a_batch(family):
    """Also after a warm prefix, and chunked."""
    together = family.completions(1.0)
    chosen = [0, 6, 9, 11]
    requests = [Request(tuple(family.prompts[i]), i, 1.0, TOKENS) for i in chosen]
    expected = [together[i] for i in chosen]
    for at, request in enumerate(requests):
        cold, warm = drive(family.engine, [request]), drive(family.engine, [request], cold=False)
        assert assert_same_completions(cold.completions, [expected[at]], f"prompt {chosen[at]}, alone") > 0
        assert_same_completions(warm.completions, [expected[at]], f"prompt {chosen[at]}, warm prefix")
        if len(request.prompt) > 128:
            assert cold.chunks >= 2 and warm.cached_tokens > 0


def test_after_a_step_they_match_again(family):
    """Every weight moves, the engine takes them, and every parameter that it has is accounted for."""
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    assert family.mismatched(family.model, 1.0, Layout(5)) > 0, "control: the engine still has the old ones"
    family.engine.sync(family.model.named_parameters())
    assert family.engine.differing_weights(family.model.named_parameters()) == []
    family.drawn.clear()
    assert family.mismatched(family.model, 1.0, Layout(5)) == 0


@pytest.mark.gpu
def test_a_compiled_engine_matches(tmp_path):
    """Inductor fuses Granite's product and sum around each block, and must round between them."""
    path = save_random(FAMILIES["granite"](), tmp_path)
    engine = start_engine(path, enforce_eager=False)
    compiled = _family(path, engine)
    assert compiled.mismatched(compiled.model, 1.0, Layout(5)) == 0


@cpu_only("in fp32")
@pytest.mark.parametrize("name", FAMILIES)
def test_patched_model_matches_the_stock_model(name, tmp_path):
    """Log-probs in fp32 to 1e-4; control: without what the family has of its own they are off by a hundred times that."""
    stock = load(save_random(FAMILIES[name](), tmp_path))
    ours = make_invariant(copy.deepcopy(stock), torch.float32)
    ids = torch.randint(0, VOCABULARY, (2, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = (model(input_ids=ids).logits.log_softmax(-1) for model in (stock, ours))
        if name == "gemma2":  # its logits too are capped by an op, which the stock forward of the causal LM does not call
            assert ours.config.final_logit_softcapping == 3.0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        every = torch.arange(119)
        scored, _ = ours(input_ids=ids[:1], token_ids=ids[0, 1:], predicted_from=every, temperature=1.0)
        torch.testing.assert_close(scored, expected[0, every, ids[0, 1:]], rtol=1e-4, atol=1e-4)
        for attribute, value in OWN.get(name, {}).items():
            changed = [m for m in ours.modules() if hasattr(m, attribute) and getattr(m, attribute) != value]
            assert changed, f"{attribute} is {value} everywhere"
            for module in changed:
                setattr(module, attribute, value)
            assert (ours(input_ids=ids).logits.log_softmax(-1) - expected).abs().max() > 1e-2, attribute


@cpu_only("in fp32")
def test_each_type_of_layer_has_its_own_angles(tmp_path):
    stock = load(save_random(FAMILIES["gemma3"](), tmp_path))
    rotary, ids = make_invariant(stock, torch.float32).model.rotary_emb, torch.arange(100)[None]
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        for kind, other in (("sliding_attention", "full_attention"), ("full_attention", "sliding_attention")):
            kept = getattr(rotary, f"{kind}_cos_table")
            setattr(rotary, f"{kind}_cos_table", getattr(rotary, f"{other}_cos_table"))
            assert (stock(input_ids=ids).logits - expected).abs().max() > 1e-2, kind
            setattr(rotary, f"{kind}_cos_table", kept)
        assert compare(stock(input_ids=ids).logits, expected) is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name):
    model = AutoModelForCausalLM.from_config(REFUSED[name]()).to(DEVICE)
    with pytest.raises(UnsupportedModel, match=NAMED[name]):
        require_exact(make_invariant(model))


def test_a_model_without_attention_is_refused():
    assert list(unsupported(MambaConfig())) == ["model_type=mamba has no attention heads; only transformers are supported"]


def test_verify_says_how_a_model_that_the_audit_refuses_is_trained(tmp_path):
    path = save_random(REFUSED["cohere"](), tmp_path / "cohere")
    with pytest.raises(UnsupportedModel, match="^CohereForCausalLM .*; invariance=off trains it without the proof$"):
        trained(path, "bfloat16")


def test_a_gpu_takes_every_family():
    assert not {name: reasons for name, config in FAMILIES.items() if (reasons := list(unsupported(config(), "cuda")))}
