"""`rlinvariant bisect` finds planted faults: the right sequence, layer and op, and the cause where its catalogue has it."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DistilBertConfig, Qwen3Config

from rlinvariant import ops
from rlinvariant.bisect import both_sides, command, search, trials
from rlinvariant.bisect.record import Recorder
from rlinvariant.bisect.report import lines
from rlinvariant.bisect.variants import own_attention
from rlinvariant.errors import UserError
from rlinvariant.models import make_trainable, require_exact, use_working_copies
from rlinvariant.models.random import save_random
from rlinvariant.sampler import vllm_model
from rlinvariant.trainer import score as scoring
from tests import commands
from tests.parity.device import DEVICE
from tests.parity.harness import keep, off_by_an_ulp, start_engine

VOCABULARY = 101  # vLLM pads it to 128
CONFIG = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
TRIAL = trials.draw_trial(VOCABULARY, 12, 40, 12, 0.7, seed=3, rows=5)  # 5 + 5 + 2; vLLM decodes 12 rows
STEP_TOKENS, LONGEST_REQUEST = 256, 128


@dataclass
class Pair:
    path: str
    engine: Any
    model: Any

    def sampler(self, name: str) -> Any:
        return self.engine.model.get_submodule(f"model.{name}")

    def trainer(self, name: str) -> Any:
        return self.model.get_submodule(f"model.{name}")

    def attention(self, layer: int) -> Any:
        return both_sides.attention_layers(self.engine)[layer].impl

    def find(self, stock: tuple[str, ...] = (), engine: Any = None, **changes: Any) -> tuple[search.Result, list[str]]:
        return self.find_any([replace(TRIAL, **changes)], stock, engine)

    def find_any(self, tried: list[trials.Trial], stock: tuple[str, ...] = (), engine: Any = None):
        result, trial = search.find_any(engine or self.engine, self.model, tried)
        said = lines(result, trial, engine or self.engine, stock)
        print("\n".join(said))
        assert len(said) <= 15 and all(len(line) < 240 for line in said)
        return result, said


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    path = save_random(CONFIG, tmp_path_factory.mktemp("models") / "qwen3", 1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = make_trainable(loaded.to(DEVICE))
    require_exact(model)
    return Pair(path, start_engine(path, longest=LONGEST_REQUEST, max_num_batched_tokens=STEP_TOKENS), model.eval())


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in the place of an attribute of this very object for a while."""
    had, was = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, was) if had else delattr(owner, name)


@contextlib.contextmanager
def changed(parameter: Any, change: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    kept = parameter.detach().clone()
    change(parameter.data)
    try:
        yield
    finally:
        parameter.data.copy_(kept)


def ulp(x: torch.Tensor) -> None:
    x.view(torch.int16).add_(1)


# ---- faults: each returns a context in which one side is wrong


def ulp_in_up(pair):
    return changed(pair.sampler("layers.1.mlp.gate_up_proj").weight, lambda w: ulp(w[384 + 7]))


def one_layer_stale(pair):
    return changed(pair.sampler("layers.1.self_attn.o_proj").weight, lambda w: w.mul_(1.01))


@contextlib.contextmanager
def all_stale(pair):
    newer = {n: p.detach().clone() for n, p in pair.model.named_parameters()}
    try:
        with torch.no_grad():
            for p in pair.model.parameters():
                p.mul_(1.02)
        yield
    finally:
        with torch.no_grad():
            for n, p in pair.model.named_parameters():
                p.copy_(newer[n])


def head_ulp(pair):
    return replaced(vllm_model._Head, "apply", off_by_an_ulp(40))


def halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    k = x.shape[-1] // 2
    parts = [ops.linear(x[..., s].contiguous(), w[:, s].contiguous()) for s in (slice(0, k), slice(k, None))]
    return parts[0] + parts[1]


def split_k(pair):
    down = pair.sampler("layers.1.mlp.down_proj")
    return replaced(down, "forward", lambda x: halves(x, down.weight))


def split_k_fp32(pair):
    """Sum the trainer's product in two parts of fp32."""
    down = pair.trainer("layers.0.mlp.down_proj")

    def forward(x):
        w = down.weight.to(x.dtype).float()
        return sum(x[..., s].float() @ w[:, s].t() for s in (slice(0, 192), slice(192, 384))).to(x.dtype)  # type: ignore[union-attr]

    return replaced(down, "forward", forward)


def tile_switch(pair):
    down = pair.sampler("layers.1.self_attn.o_proj")
    forward = down.forward
    few = 16  # of 12 sequences that decode, and more rows when they are prefilled

    def switched(x):
        return halves(x, down.weight) if x.reshape(-1, x.shape[-1]).shape[0] <= few else forward(x)

    return replaced(down, "forward", switched)


@contextlib.contextmanager
def tile_switch_of_the_op(pair):
    """Let the op itself depend on the number of rows, on both sides, as a changed kernel does."""
    linear: Any = sys.modules["rlinvariant.ops.linear"]

    def faulty(right):
        def product(x, w, b):
            if len(x) > 16 or w.shape != (256, 384):
                return right(x, w, b)
            return sum(right(x[:, s].contiguous(), w[:, s].contiguous(), None) for s in (slice(0, 192), slice(192, 384)))

        return product

    with replaced(linear, "_vendor", faulty(linear._vendor)), replaced(linear, "_written", faulty(linear._written)):
        yield


def norm_order(pair):
    norm = pair.sampler("layers.1.input_layernorm")

    def forward(x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.float()
        return y.to(x.dtype)

    return replaced(norm, "forward", forward)


def other_eps(pair):
    return replaced(pair.sampler("norm"), "variance_epsilon", 1e-3)


def swiglu_rounding(pair):
    mlp = pair.sampler("layers.0.mlp")

    def forward(x):
        gate, up = mlp.gate_and_up(x)
        return mlp.down_proj((F.silu(gate.float()) * up.float()).to(x.dtype))

    return replaced(mlp, "forward", forward)


@contextlib.contextmanager
def rope_fp32(pair):
    rotary = pair.sampler("rotary_emb")
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 64, 2).float() / 64))
    angles = torch.arange(256).float()[:, None] * inv_freq
    with replaced_buffers(rotary, cos_table=angles.cos(), sin_table=angles.sin()):
        yield


@contextlib.contextmanager
def replaced_buffers(module, **buffers):
    kept = {name: getattr(module, name) for name in buffers}
    for name, value in buffers.items():
        setattr(module, name, value.to(kept[name]))
    yield
    for name, value in kept.items():
        setattr(module, name, value)


def no_q_norm(pair):
    """Leave out the trainer's norm of queries."""
    attention = pair.trainer("layers.1.self_attn")
    heads = attention.heads

    def without(q, k, v, cos, sin):
        turned = heads(q, k, v, cos, sin)
        b, t, half = q.shape[0], q.shape[1], cos.shape[-1]
        angles = (x.expand(b, t, half).flatten(0, 1) for x in (cos, sin))
        plain = ops.rope(q.view(b * t, -1, 64), *angles)
        return plain.view(b, t, -1, 64).transpose(1, 2), turned[1], turned[2]

    return replaced(attention, "heads", without)


def attend(pair, layer: int, one: Callable[..., torch.Tensor]):
    """Compute the sampler's attention of a layer by `one(q, k, v, position, scale)`, q, k, v [P, heads, D] of a sequence."""
    impl = pair.attention(layer)

    def forward(layer, query, key, value, kv_cache, m, output, *args, **kwargs):
        starts, lens = m.cu_seqlens_q.tolist(), m.kv_lens.tolist()
        for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
            pages = kv_cache[m.block_table[i].long()].transpose(1, 2).flatten(0, 1)[: lens[i]]  # [P, H_kv, 2 D]
            k, v = pages.split(64, -1)
            q = torch.zeros(lens[i], 4, 64, dtype=query.dtype)
            q[lens[i] - (b - a) :] = query[a:b].view(b - a, 4, 64)
            for row in range(a, b):
                output.view(-1, 4, 64)[row] = one(q, k, v, lens[i] - (b - row), impl.scale)
        return output

    return replaced(impl, "forward", forward)


def windowed(pair):
    def one(q, k, v, p, scale):
        keys = slice(max(0, p - 15), p + 1)
        kk, vv = (x[keys].float().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        return ((q[p].float()[:, None] @ kk.transpose(1, 2) * scale).softmax(-1) @ vv)[:, 0]

    return attend(pair, 1, one)


def asked_for_a_window(pair):
    """Ask the op for a window that the trainer does not have."""
    return attend(pair, 1, lambda q, k, v, p, scale: own_attention(q, k, v, p, scale, window=16))


def sdpa(pair):
    def one(q, k, v, p, scale):
        qq, kk, vv = (x.transpose(0, 1)[None] for x in (q[p : p + 1], k[: p + 1], v[: p + 1]))
        kk, vv = (x.repeat_interleave(2, 1) for x in (kk, vv))
        return F.scaled_dot_product_attention(qq, kk, vv, scale=scale)[0, :, 0]

    return attend(pair, 0, one)


def a_key_in_the_cache(pair):
    impl = pair.attention(1)
    update = impl.do_kv_cache_update

    def faulty(layer, key, value, *args):
        key = key.clone()
        ulp(key[:, 0])
        update(layer, key, value, *args)

    return replaced(impl, "do_kv_cache_update", faulty)


def positions_shifted(pair):
    rotary = pair.trainer("rotary_emb")
    forward = rotary.forward
    return replaced(rotary, "forward", lambda x, position_ids, *args: forward(x, position_ids + 1, *args))


def predicted_one_early(pair):
    pack = scoring.pack

    def shifted(*args):
        packed = pack(*args)
        return replace(packed, predicted_from=(packed.predicted_from - 1).clamp(min=0))

    return replaced(scoring, "pack", shifted)


def reciprocal(pair):
    """Multiply the logits of one request by the reciprocal of its temperature."""
    sample = ops.sample

    def faulty(logits, temperature, seeds, positions):
        tokens, logprobs, ranks = sample(logits, temperature, seeds, positions)
        _, wrong, _ = sample(logits.float() * (1 / temperature)[:, None], torch.ones_like(temperature), seeds, positions)
        return tokens, torch.where(seeds == TRIAL.seeds[7], wrong, logprobs), ranks

    return replaced(ops, "sample", faulty)


def padded_vocabulary(pair):
    sample = ops.sample

    def faulty(logits, temperature, seeds, positions):
        tokens, _, ranks = sample(logits, temperature, seeds, positions)
        logprobs = ops.log_softmax(F.pad(logits, (0, 128 - VOCABULARY)), temperature).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs, ranks

    return replaced(ops, "sample", faulty)


@contextlib.contextmanager
def scaled(pair):
    """Scale the output of a whole MLP."""
    mlp = pair.sampler("layers.1.mlp")
    forward = mlp.forward
    with replaced(mlp, "forward", lambda x: forward(x) * 1.01):
        yield


@contextlib.contextmanager
def upcast(pair):
    def wide(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.float()

    hook = pair.model.model.register_forward_hook(wide)
    yield
    hook.remove()


FAULTS = [  # fault, layer, role, side that deviates or None, what the cause must say
    (ulp_in_up, 1, "up projection", None, "a weight of other bits.*gate_up_proj"),
    (one_layer_stale, 1, "o projection", None, "a weight of other bits.*o_proj"),
    (all_stale, None, "embedding", None, "stale or other weights"),
    (head_ulp, None, "lm_head", None, "the op was given others"),
    (split_k, 1, "down projection", "sampler", "split-K.* 2 parts, each rounded to bfloat16"),
    (split_k_fp32, 0, "down projection", "trainer", "split-K: .* 2 fp32 parts|number of rows"),
    (tile_switch, 1, "o projection", "sampler", "depends on the number of rows"),
    (tile_switch_of_the_op, 0, "down projection", None, "kernel of both sides depends on the number of rows"),
    (norm_order, 1, "input norm", "sampler", "other rounding order"),
    (other_eps, None, "final norm", None, "eps=0.001 in the sampler, 1e-06 in the trainer"),
    (swiglu_rounding, 0, "swiglu", "sampler", "inner rounding is left out"),
    (rope_fp32, None, "rope table", "sampler", "fp32 angles"),
    (no_q_norm, 1, "q norm and rotation", "trainer", "norm is left out"),
    (windowed, 1, "attention", "sampler", "sliding window: only the last 16 of"),
    (asked_for_a_window, 1, "attention", None, "window=16 in the sampler"),
    (sdpa, 0, "attention", "sampler", "scaled_dot_product_attention"),
    (a_key_in_the_cache, 1, "attention", "sampler", "cache"),
    (positions_shifted, None, "rope table", "trainer", r"position off by \+1"),
    (predicted_one_early, None, "lm_head", None, "position off by -1: the trainer's input"),
    (reciprocal, None, "log-prob", "sampler", "reciprocal"),
    (padded_vocabulary, None, "log-prob", "sampler", "vocabulary padding: .* 27 columns"),
    (scaled, 1, "layer output", None, "between the down projection and this"),
    (upcast, None, "lm_head", None, "autocast or an upcast"),
]


@pytest.mark.parametrize(("fault", "layer", "role", "deviates", "cause"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_a_planted_fault_is_located_and_named(pair, fault, layer, role, deviates, cause):
    with fault(pair):
        result, said = pair.find()
    first = result.first
    assert first is not None and first.place == (layer, role), said
    assert first.sequence == 7 or fault is not reciprocal
    assert 0 < result.mismatched <= result.compared == 12 * 12
    text = "\n".join(said)
    assert re.search(rf"^cause .*{cause}", text, re.MULTILINE), text
    assert (f"deviates   the {deviates}" in text) if deviates else ("deviates" not in text), text


def test_without_a_fault_there_is_nothing_to_bisect(pair):
    result, said = pair.find()
    assert said[0] == "nothing to bisect: 0 of 144 tokens differ (temperature 0.7)" and result.first is None
    assert said[1] == "equal      12 prompts of up to 40 tokens (1 prefill cut)"
    assert said[2].startswith("exit code  0: none of these differ")


# ---- faults that the first batch does not show


def rows_of_the_crowd(pair):
    down = pair.sampler("layers.1.self_attn.o_proj")
    forward = down.forward
    return replaced(down, "forward", lambda x: halves(x, down.weight) if 48 < x.shape[-2] <= 64 else forward(x))


@contextlib.contextmanager
def shifted_when(pair, when: Callable[[Any], bool], update: Callable[..., None] = lambda **how: None):
    """Let layer 1 attend wrongly where `when(metadata)`; `update` hears how each draw is done."""
    impl, drive = pair.attention(1), trials.drive
    forward = impl.forward

    def faulty(layer, query, key, value, kv_cache, m, output, *args, **kwargs):
        forward(layer, query, key, value, kv_cache, m, output, *args, **kwargs)
        if when(m):
            ulp(output)
        return output

    def heard(engine, requests, **how):
        update(**how)
        return drive(engine, requests, **how)

    with replaced(impl, "forward", faulty), replaced(trials, "drive", heard):
        yield


def prefill_that_goes_on(pair):
    def cut(m):
        rows = m.cu_seqlens_q.diff()
        return bool(((rows > 1) & (rows < m.kv_lens)).any())

    return shifted_when(pair, cut)


def warm_prefix(pair):
    cold = [True]
    return shifted_when(pair, lambda m: not cold[0], lambda cold=True, preempt=None, now=cold: now.__setitem__(0, cold))


@contextlib.contextmanager
def a_key_computed_again(pair):
    """Write one wrong key of each token to the cache after a preemption, until the next batch."""
    impl, llm, again = pair.attention(1), pair.engine.llm, [False]
    update, reset = impl.do_kv_cache_update, llm.reset_prefix_cache

    def faulty(layer, key, value, *args):
        key = key.clone()
        if again[0]:
            ulp(key[:, 0])
        update(layer, key, value, *args)

    def heard(reset_running_requests=False):
        again[0] = reset_running_requests
        return reset(reset_running_requests=reset_running_requests)

    with replaced(impl, "do_kv_cache_update", faulty), replaced(llm, "reset_prefix_cache", heard):
        yield


RARE = [  # fault, trials until it shows, what the first difference is, what the last line must say
    (rows_of_the_crowd, 4, "o projection", "only with so many rows: look at what depends on their number"),
    (prefill_that_goes_on, 5, "attention", "only with long prompts, which are cut: look at what the rest of one reads"),
    (warm_prefix, 6, "attention", "only on a warm prefix: look at what is read from the cache"),
    (a_key_computed_again, 7, "attention", "only when preempted: look at what is computed again"),
]


@pytest.mark.parametrize(("fault", "until", "role", "hint"), RARE, ids=[f[0].__name__ for f in RARE])
def test_a_fault_that_the_first_batch_does_not_show_is_found(pair, fault, until, role, hint):
    tried = trials.all_trials(VOCABULARY, 12, 20, 8, 0.7, 3, 5, STEP_TOKENS, LONGEST_REQUEST - 9)
    with fault(pair):
        result, said = pair.find_any(tried)
    assert len(result.tried) == until and result.first is not None and result.first.place == (1, role), said
    assert said[-3] == f"shows      {hint}" and said[-2].startswith("equal      12 prompts of up to 20 tokens"), said
    assert said[-1].startswith("differs    "), said


def test_without_a_fault_everything_recorded_is_equal(pair):
    """Places align and are whole on both sides, so that a difference is never one of recording."""
    ours, theirs, _, _ = both_sides.record(pair.engine, pair.model, TRIAL, 6)
    assert search.first_difference(ours, theirs) is None
    assert ours.trace.keys() == theirs.trace.keys() and len(theirs.trace) == 5 + 2 * 14
    last = len(TRIAL.prompts[6]) + 11  # the last token drawn goes into the trainer alone
    for place in theirs.trace:
        assert search.side_at(ours, place).keys() == search.side_at(theirs, place).keys() - {last}, place
    assert search.side_at(ours, (1, "attention")).keys() == set(range(last))
    assert search.side_at(ours, (None, "lm_head")).keys() == set(range(len(TRIAL.prompts[6]) - 1, last))


def test_a_stock_engine_is_named_as_such(pair):
    """It has no plugin: the outputs of vLLM's own modules are seen."""
    stock = start_engine(pair.path, longest=64, invariant=False)
    result, said = pair.find(("sampler",), stock)
    assert result.first is not None and result.first.place is not None
    assert result.mismatched > 72 and any("stock kernels: the sampler runs without the plugin" in line for line in said)


def test_nan_on_both_sides_is_traced_to_where_it_appears(pair):
    nan = [changed(w, lambda w: w[5].fill_(float("nan"))) for w in (pair.sampler("norm").weight, pair.trainer("norm").weight)]
    with nan[0], nan[1]:
        result, said = pair.find()
    assert result.mismatched == 144 and result.first is not None and result.first.place == (None, "final norm")
    assert any("not a number, on both sides" in line for line in said)


def test_what_does_not_come_back_is_said(pair):
    calls = []
    pack = scoring.pack

    def once(*args):
        calls.append(True)
        packed = pack(*args)
        return replace(packed, predicted_from=(packed.predicted_from - 1).clamp(min=0)) if len(calls) == 1 else packed

    with replaced(scoring, "pack", once):
        result, said = pair.find()
    assert result.first is None and result.mismatched > 0
    assert said[1].startswith("not reproducible") and re.fullmatch(r"sampler .*: (.*), then \1", said[2]), said
    assert (again := re.fullmatch(r"trainer .*: (.*), then (.*)", said[3])) and again[1] != again[2], said


def test_working_copies_are_recorded_as_the_modules_are(pair):
    """On a GPU the trainer calls no q_proj, k_proj, v_proj, gate_proj or up_proj, but one product for each group."""
    merged: Any = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32)
    merged = use_working_copies(make_trainable(merged), torch.bfloat16).eval()
    places = []
    for model in (pair.model, merged):
        recorder = Recorder(model)
        drawn = trials.draw(pair.engine, TRIAL)[1]
        with recorder.recording(), both_sides.expecting(model, TRIAL, drawn, 6, recorder, False):
            both_sides.score_rows(model, TRIAL, drawn, 5, False)
        places.append({place: [list(b.value.shape) for b in blocks] for place, blocks in recorder.trace.items()})
    assert places[0] == places[1] and len(places[0]) == 4 + 2 * 14


# ---- the command


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    """It needs a config.json alone, and exits with 0, or with 1 where there is a fault."""
    CONFIG.save_pretrained(tmp_path)
    sides = command.load_sides
    made = []

    def kept(*args):
        made.append(sides(*args))
        keep(made[-1][1])
        return made[-1]

    monkeypatch.setattr(command, "load_sides", kept)
    few = ["--random", "--tokens", "4", "--sequences", "5"]
    assert commands.run("bisect", str(tmp_path), *few, "--chunk", "64", "--seed", "2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing to bisect: 0 of 328 tokens differ (temperature 0.7)" in said
    in_words = (
        r"5 prompts of up to 48 tokens .*; 1 of up to 1; 3 of up to 48 .*; 64 of up to 1; "
        r"2 of up to 129 \([1-9] prefills? cut\); 2 of up to 129 \(.*drawn again, [1-9]\d+ tokens from the cache\); "
        r"5 of up to 48 \(.*[1-5] preemptions?\) exit code 0"
    )
    assert re.search(in_words, said), said
    with_fault = Pair("", made[0][1], made[0][0])
    monkeypatch.setattr(command, "load_sides", lambda *args: made[0])
    with split_k(with_fault):
        assert commands.run("bisect", str(tmp_path), *few) == 1
    said = capsys.readouterr().out
    assert "first      layer 1, down projection" in said and "cause      split-K" in said
    assert "differs    5 prompts of up to 48 tokens (1 prefill cut)" in said


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "MODEL"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--token", "4"], "--token 4"),
        (["a", "--chunk", "16"], "--chunk: 16: expected a whole number of at least 64"),
        (["a", "--tokens", "0"], "--tokens: 0: expected a whole number of at least 1"),
        (["a", "--temperature", "0"], "--temperature: 0: expected a number of at least 0.01"),
        (["a", "--dtype", "fp8"], "fp8"),
        (["a", "--seed", "x"], "--seed: x: expected a whole number"),
    ],
)
def test_bad_arguments_are_one_line(argv, problem):
    with pytest.raises(UserError) as caught:
        commands.run("bisect", *argv)
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "arguments", "problem"),
    [
        (None, [], "cannot be loaded|found no config.json"),
        (DistilBertConfig(attention_dropout=0.0), ["--random"], "is not a transformers causal language model"),
        (CONFIG, [], "cannot be loaded: .*random needs the configuration alone"),
        (CONFIG, ["--random", "--prompt", "250"], "expected at most 255 together"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(config, arguments, problem, tmp_path):
    if config is not None:
        config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        commands.run("bisect", str(tmp_path), *arguments)
    assert len(str(caught.value).splitlines()) == 1
