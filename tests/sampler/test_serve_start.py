"""`rlinvariant serve` refuses what could not be exact before it starts, and is ready when the engine has proved itself."""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig as PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import CompilationMode

from rlinvariant import serve
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.models import lora
from rlinvariant.sampler import vllm_serve, wire
from rlinvariant.sampler.vllm_for_trainers import ROOM_KEY, ForTrainers
from tests.parity.device import CUDA


def test_options_that_could_not_be_exact_are_refused_in_one_list(arithmetic_dir):
    options = {
        "--tensor-parallel-size": "2",
        "--quantization": "fp8",
        "--enable-lora": None,
        "--kv-cache-dtype": "fp8",
        "--speculative-config": '{"method": "ngram", "num_speculative_tokens": 2}',
        "--logprobs-mode": "raw_logits",
        "--dtype": "float16",
        "--model-impl": "vllm",
        "--api-server-count": "2",
        "--generation-config": "auto2",
        "--logits-processors": "a:B",
        "--worker-cls": "a.B",
        "--enable-prompt-embeds": None,
        "--uds": "/tmp/nowhere",
        "--host": "127.0.0.2",
        "--port": "8001",
    }
    argv = [text for pair in options.items() for text in pair if text]
    with pytest.raises(ConfigErrors) as refused:
        vllm_serve.serve([arithmetic_dir, *argv])
    assert {line.split()[0].rstrip(":") for line in refused.value.errors} == set(options) - {"--uds"}


def test_a_model_that_could_not_be_exact_is_refused(arithmetic_dir, tmp_path):
    config = json.loads((Path(arithmetic_dir) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="hidden_act=gelu; supported: silu, swish, gelu_pytorch_tanh; use vllm serve"):
        vllm_serve.serve([str(tmp_path)])
    with pytest.raises(UserError, match="MODEL: missing"):
        vllm_serve.serve([])
    with pytest.raises(UserError, match="--max-model-len 99999: expected at most"):
        vllm_serve.serve([arithmetic_dir, "--max-model-len", "99999"])


def test_a_model_without_a_tokenizer_is_refused_before_the_engine_starts(arithmetic_dir, token_file, tmp_path):
    """A trainer brings tokens, and is served without. The control is another directory's tokenizer."""
    AutoConfig.from_pretrained(arithmetic_dir).save_pretrained(tmp_path / "bare")
    bare = str(tmp_path / "bare")
    with pytest.raises(UserError, match=f"^MODEL={bare}: no tokenizer: none of its files is there; .*: --tokenizer DIR$"):
        vllm_serve.prepared([bare])
    with pytest.raises(UserError, match=f"^--tokenizer={bare}: no tokenizer: none of its files is there"):
        vllm_serve.prepared([arithmetic_dir, "--tokenizer", bare])
    with pytest.raises(UserError, match="--skip-tokenizer-init True: expected False"):
        vllm_serve.prepared([bare, "--skip-tokenizer-init"])
    for options in (["--tokenizer", arithmetic_dir], ["--trainer-token-file", token_file]):
        assert vllm_serve.prepared([bare, *options])[1].model == bare


ROOM = ["--trainer-token-file", "TOKEN", "--lora", "r=4", "target_modules=q_proj,v_proj"]


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "trainer.token"
    path.touch(0o600)
    path.write_text("0123456789abcdef" * 4)
    return str(path)


def test_a_server_has_room_from_its_start_for_the_adapters_that_a_trainer_makes(arithmetic_dir, token_file):
    argv = [token_file if text == "TOKEN" else text for text in ROOM]
    _, args = vllm_serve.prepared([arithmetic_dir, *argv], None, serve.room)
    config = PeftConfig(r=4, target_modules=["q_proj", "v_proj"])
    trained = lora.applied(AutoModelForCausalLM.from_pretrained(arithmetic_dir), config, seed=0)
    assert args.additional_config[ROOM_KEY] == lora.ranks(trained) and args.trainer_facts["room"] is True
    _, args = vllm_serve.prepared([arithmetic_dir, *argv[:2]], None, serve.room)
    assert ROOM_KEY not in args.additional_config and args.trainer_facts["room"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ROOM[2:],
            "--lora r=4 target_modules=q_proj,v_proj: expected --trainer-token-file, of the trainer who brings adapters",
        ),
        ([*ROOM[:2], "--lora", "r=0"], "--lora r=0: expected a rank"),
        ([*ROOM[:2], "--lora", "rank=4"], "--lora rank"),
        ([*ROOM[:2], "--lora", "r=4", "target_modules=c_attn"], "--lora target_modules"),
        ([*ROOM[:2], "--lora", "r=129"], "--lora r=129: expected at most 128, the model's width"),
    ],
)
def test_room_for_no_adapters_is_refused_in_one_line(options, said, arithmetic_dir, token_file):
    with pytest.raises(UserError) as caught:
        vllm_serve.prepared([arithmetic_dir, *(token_file if x == "TOKEN" else x for x in options)], None, serve.room)
    assert str(caught.value).splitlines()[0].startswith(said), caught.value


def test_a_compiled_engine_takes_the_adapters_alone_that_it_has_room_for(arithmetic_dir, exact_engine):
    """One that is not compiled makes room for any."""
    runner = exact_engine._runner
    own, other = ({f"model.layers.{i}.self_attn.q_proj": rank for i in range(2)} for rank in (4, 8))
    engine: Any = ForTrainers()
    engine.model_runner, engine.model_config = runner, SimpleNamespace(hf_config=runner.model_config.hf_config)
    for mode, room, ranks, said in (
        (CompilationMode.NONE, {}, own, None),
        (CompilationMode.VLLM_COMPILE, {}, {}, None),
        (CompilationMode.VLLM_COMPILE, {}, own, wire.COMPILED),
        (CompilationMode.VLLM_COMPILE, own, own, None),
        (
            CompilationMode.VLLM_COMPILE,
            own,
            other,
            "it was compiled with room for LoRA adapters, r 4, on 2 projections: q_proj; the",
        ),
        (
            CompilationMode.VLLM_COMPILE,
            own,
            {},
            "it was compiled with room for LoRA adapters, r 4, on 2 projections: q_proj; the",
        ),
    ):
        config = {"compilation_config": SimpleNamespace(mode=mode), "additional_config": {ROOM_KEY: room} if room else {}}
        engine.vllm_config = SimpleNamespace(**config)
        found = engine.unfit(ranks)
        assert found is None if said is None else found is not None and found.startswith(said), (mode, room, ranks, found)


def test_the_trainers_checks_are_made_of_the_configuration(arithmetic_dir):
    """A model whose layers do something that no op owns does not start, though its configuration looks harmless."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    config = AutoConfig.from_pretrained(arithmetic_dir)
    device = torch.device("cuda" if CUDA else "cpu")
    assert vllm_serve.audit_config(config, torch.bfloat16, device) == "Qwen3ForCausalLM"
    forward = Qwen3ForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = torch.softmax(out.logits, -1)
        return out

    with mock.patch.object(Qwen3ForCausalLM, "forward", doubled), pytest.raises(UserError):
        vllm_serve.audit_config(config, torch.bfloat16, device)


def test_a_model_that_will_be_cut_is_checked_in_the_form_that_it_has_then(arithmetic_dir, monkeypatch):
    """Shards join projections at each use on a GPU. That form, forced here, is refused with a product that no op owns."""
    from transformers import AutoConfig

    from rlinvariant.models import audit_config, make_invariant, use_working_copies, working

    config, device = AutoConfig.from_pretrained(arithmetic_dir), torch.device("cpu")
    joined = lambda model, dtype, shards_on: use_working_copies(make_invariant(model, dtype), dtype, kept=False)  # noqa: E731
    monkeypatch.setattr(sys.modules["rlinvariant.models.audit"], "make_trainable", joined)
    assert audit_config(config, torch.bfloat16, device, sharded=True) == "Qwen3ForCausalLM"
    by_torch = lambda self, x, *linears: torch.nn.functional.linear(x, torch.cat([each.weight for each in linears]))  # noqa: E731
    monkeypatch.setattr(working._Product, "__call__", by_torch)
    assert audit_config(config, torch.bfloat16, device) == "Qwen3ForCausalLM"
    with pytest.raises(UserError, match="computes outside rlinvariant.ops"):
        audit_config(config, torch.bfloat16, device, sharded=True)


@pytest.mark.parametrize("proved", [True, False])
def test_the_server_is_ready_only_when_the_engine_has_said_so(proved, capsys):
    """A real uvicorn around a real application; the engine's answer is given here."""
    import uvicorn
    from starlette.applications import Starlette

    async def collective_rpc(method: str) -> list[str]:
        assert method == "prove"
        if not proved:
            raise UserError("it samples by StockSampler")
        return ["it is"]

    app = Starlette()
    app.state.engine_client = SimpleNamespace(collective_rpc=collective_rpc)
    app.add_middleware(vllm_serve.Proof)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))

    async def stop_when_started() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        server.should_exit = True

    async def start() -> None:
        stopping = asyncio.create_task(stop_when_started())
        try:
            await server.serve()
        except SystemExit as exit:  # by uvicorn, where start-up failed
            assert exit.code != 0
        stopping.cancel()

    asyncio.run(start())
    assert server.started is proved
    assert ("exact: it is" in capsys.readouterr().out) is proved
