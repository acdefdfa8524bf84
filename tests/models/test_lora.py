"""PEFT's layers with the adapter inside the product: PEFT's function, and what is refused."""

import copy
import importlib
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rlinvariant import config
from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.models import lora, make_invariant, require_exact
from rlinvariant.models.working import join_adapted
from rlinvariant.ops.lora import is_joinable
from tests.models.small import SUPPORTED, build, logprobs, sequences, stock_logprobs
from tests.parity.device import CUDA, fp32_only_on_cpu


def adapted(family: str, **options):
    """A model in PEFT, whose adapters count: B is zero in a new one."""
    options = {"r": 8, "lora_alpha": 24, "target_modules": "all-linear", **options}
    model = lora.applied(build(family), LoraConfig(**options), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return model


@fp32_only_on_cpu
@pytest.mark.parametrize("family", SUPPORTED)
def test_it_computes_what_peft_does(family):
    theirs, rows = adapted(family), sequences()
    ours = make_invariant(copy.deepcopy(theirs), torch.float32)
    require_exact(ours)
    right, base = (stock_logprobs(model, rows)[0] for model in (theirs, build(family)))
    torch.testing.assert_close(logprobs(ours, rows)[0], right, rtol=0, atol=2e-5)
    assert (right - base).abs().max() > 0.1, "the adapters count"
    with ours.disable_adapter():
        torch.testing.assert_close(logprobs(ours, rows)[0], base, rtol=0, atol=2e-5)


@fp32_only_on_cpu
def test_adapters_that_peft_has_merged_count_once():
    theirs, rows = adapted("qwen3"), sequences()
    ours = make_invariant(copy.deepcopy(theirs), torch.float32)
    before = logprobs(ours, rows)[0]
    for model in (theirs, ours):
        model.merge_adapter()
    torch.testing.assert_close(logprobs(ours, rows)[0], stock_logprobs(theirs, rows)[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(logprobs(ours, rows)[0], before, rtol=0, atol=1e-4)
    ours.unmerge_adapter()
    torch.testing.assert_close(logprobs(ours, rows)[0], before, rtol=0, atol=1e-4)


@fp32_only_on_cpu
def test_a_scaling_of_its_own_is_peft_s():
    rows = sequences()
    for options in ({"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"], "r": 5}, {"init_lora_weights": "gaussian"}):
        theirs = adapted("qwen3", **options)
        ours = make_invariant(copy.deepcopy(theirs), torch.float32)
        torch.testing.assert_close(logprobs(ours, rows)[0], stock_logprobs(theirs, rows)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        ("qwen3", {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 24}),
        ("llama", {"target_modules": ["down_proj"]}),
    ],
)
def test_joined_projections_train_what_they_train_apart(family, options, monkeypatch):
    """A trainer on a GPU multiplies q, k and v as one. Log-probs have the same bits, and without adapters, too."""
    if not CUDA:
        monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    apart = make_invariant(adapted(family, **options).bfloat16(), torch.bfloat16)
    joined = join_adapted(copy.deepcopy(apart))
    require_exact(joined)
    assert apart.state_dict().keys() == joined.state_dict().keys()
    changed = [type(m) is not type(n) for m, n in zip(apart.modules(), joined.modules(), strict=True)]
    assert any(changed) is (options.get("target_modules") != ["down_proj"]), "no projection that reads what others read"
    found = []
    for model in (apart, joined):
        values = logprobs(model, sequences())[0]
        values.sum().backward()
        with model.disable_adapter(), torch.no_grad():
            found.append((values.detach(), logprobs(model, sequences())[0]))
    for right, got in zip(*found, strict=True):
        assert_bits_equal(got, right, "log-probs")
    assert not torch.equal(*found[0]), "the adapters count"
    for (name, p), q in zip(apart.named_parameters(), joined.parameters(), strict=True):
        assert (p.grad is None) is (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).norm() < 0.03 * p.grad.norm(), name  # bf16 on the way, in another order


def test_projections_whose_width_ends_inside_a_step_of_the_matrix_unit_stay_apart():
    """A sampler goes by the same rule."""
    model = make_invariant(adapted("qwen2").bfloat16(), torch.bfloat16)
    layer = model.base_model.model.model.layers[0]
    for projection in (layer.self_attn.q_proj, layer.mlp.gate_proj):
        projection.base_layer.in_features += 8
    before = [type(m) for m in layer.modules()]
    join_adapted(model)
    assert [type(m) for m in layer.modules()] == before and not is_joinable(200) and is_joinable(208)


def test_adapters_alone_get_gradients():
    model = make_invariant(adapted("llama"), torch.bfloat16)
    logprobs(model, sequences())[0].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)


def test_first_values_come_from_the_seed_alone():
    def first(seed: int) -> torch.Tensor:
        torch.randn(3)
        return next(w for name, w in lora.applied(build("llama"), LoraConfig(r=4), seed).named_parameters() if "lora_A" in name)

    before = torch.random.get_rng_state()
    model = lora.applied(build("llama"), LoraConfig(r=4), 1)
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2)) and lora.ranks(model)["model.layers.0.self_attn.q_proj"] == 4


def test_names_are_those_of_the_model_without_peft():
    plain, model = build("qwen3"), adapted("qwen3")
    assert {name for name, _ in lora.base(model)} == {name for name, _ in plain.named_parameters()}
    name, b = next((name, w) for name, w in lora.adapters(model) if name.endswith(lora.B))
    layer = model.get_submodule(f"base_model.model.{name.removesuffix('.' + lora.B)}")
    assert torch.equal(b, layer.lora_B["default"].weight * 3), "alpha / r is in it"
    assert dict(lora.pairs(plain)).keys() == dict(plain.named_parameters()).keys(), "without PEFT, all parameters"


REFUSED = {
    "lora_dropout": 0.1,
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "init_lora_weights": "pissa",
    "rank_pattern": {"q_proj": 3},
    "target_parameters": ["weight"],
    "alora_invocation_tokens": [5, 6],
    "fan_in_fan_out": True,
    "revision": "v2",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_named(key):
    (line,) = lora.problems(LoraConfig(**{key: REFUSED[key]}))
    assert line.startswith(f"peft_config.{key}={REFUSED[key]}: expected ")
    assert list(lora.problems(LoraConfig(r=4, use_rslora=True))) == []


def test_projections_that_are_not_there_are_one_line():
    with pytest.raises(UserError, match="^lora.target_modules: .*no_proj.* not found in the base model"):
        lora.applied(build("llama"), LoraConfig(target_modules=["no_proj"]), 0)
    with pytest.raises(UserError, match="^lora.target_modules has no_proj: expected projections of the model"):
        lora.applied(build("llama"), LoraConfig(target_modules=["q_proj", "no_proj", "layers.0.mlp.up_proj"]), 0)
    lora.applied(build("llama"), LoraConfig(target_modules=["q_proj", "layers.0.mlp.up_proj"]), 0)


def test_an_adapter_that_is_loaded_to_be_read_only_is_refused(tmp_path):
    """PEFT loads adapters without gradients, unless it is told otherwise: there was nothing to train, and a traceback."""
    adapted("llama").save_pretrained(tmp_path)
    read_only, trainable = (PeftModel.from_pretrained(build("llama"), str(tmp_path), is_trainable=x) for x in (False, True))
    (line,) = lora.problems(read_only.peft_config["default"])
    assert line.startswith("peft_config.inference_mode=True: expected False") and "is_trainable=True" in line
    assert list(lora.problems(trainable.peft_config["default"])) == []


def test_embeddings_are_refused():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert list(lora.problems(model.peft_config["default"])) == [
        "peft_config.target_modules has embed_tokens: expected projections of the decoder alone; leave it out"
    ]


def test_a_regular_expression_names_projections():
    """PEFT matches a string with whole names, and a list with their ends."""
    regex, names = (config.LoraConfig(r=4, target_modules=[x]) for x in (r".*layers\.1\..*_proj", "q_proj"))
    found = lora.ranks(lora.applied(build("llama"), regex.peft_config(), 0))
    assert len(found) == 7 and all(".layers.1." in name for name in found)
    assert {name.rpartition(".")[2] for name in lora.ranks(lora.applied(build("llama"), names.peft_config(), 0))} == {"q_proj"}
    for wide in (r".*(q_proj|lm_head)", r".*(q_proj|embed_tokens)"):
        said = "^lora.target_modules takes .*: expected projections of the decoder alone; leave it out"
        with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=said):
            lora.applied(build("llama"), config.LoraConfig(r=4, target_modules=[wide]).peft_config(), 0)
    with pytest.raises(ConfigErrors, match="expected names of projections, all-linear, or one regular expression"):
        config.parse(["recipe=arithmetic", "lora.r=4", "lora.target_modules=.*("])


def test_a_rank_beyond_the_models_width_is_refused():
    width = build("llama").config.hidden_size
    with pytest.raises(UserError, match=f"lora.r={width + 1}: expected at most {width}, the model's width"):
        lora.applied(build("llama"), LoraConfig(r=width + 1, target_modules=["q_proj"]), 0)


def test_what_the_model_has_no_place_for_is_found_without_its_weights():
    model_config = build("llama").config
    width = model_config.hidden_size

    def found(said, **settings):
        return lora.fit_problems(said, LoraConfig(**settings), model_config)

    assert found("lora.", r=width) == [] and found("lora.", target_modules="all-linear") == []
    (wide,) = found("peft_config.", r=width + 1)
    (none,) = found("--lora ", target_modules=["no_proj"])
    (one,) = found("lora.", target_modules=["q_proj", "no_proj"])
    assert wide.startswith(f"peft_config.r={width + 1}: expected at most {width}")
    assert none.startswith("--lora target_modules: ") and one.startswith("lora.target_modules has no_proj: expected")


@pytest.mark.parametrize("setting", ["invariance=sampler", "invariance=trainer"])
def test_what_adapters_cannot_be_trained_with_is_one_line(setting):
    with pytest.raises(ConfigErrors) as raised:
        config.parse(["recipe=arithmetic", "lora.r=4", setting])
    assert len([x for x in raised.value.errors if x.startswith(f"lora.r=4: expected 0 with {setting}: ")]) == 1
