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

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.sampler import vllm_serve
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
