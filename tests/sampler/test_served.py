"""Samplers that stand apart: servers on loopback draw what the engine in this process draws, for one trainer alone."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from rlinvariant import checksums
from rlinvariant.errors import ServersLost, UserError
from rlinvariant.sampler import handover, served, server, wire
from rlinvariant.sampler.served import ServedSampler
from rlinvariant.sampler.vllm_guard import WITH_TOKEN
from rlinvariant.text import printable
from rlinvariant.trainer_token import Token
from tests.parity.device import cpu_only
from tests.sampler.servers import Server

pytestmark = [pytest.mark.slow, cpu_only("servers and an engine would share a GPU")]
TOKEN = "0123456789abcdef" * 4
LONGEST = 192
END = 2  # of the model, whatever a request says


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("token") / "trainer.token"
    path.touch(0o600)
    path.write_text(TOKEN)
    return str(path)


@pytest.fixture(scope="module")
def servers(arithmetic_dir, token_file, tmp_path_factory) -> Iterator[list[Server]]:
    """Two of them; a test that kills one has its own."""
    started = start(2, arithmetic_dir, token_file, tmp_path_factory.mktemp("logs"))
    yield started
    for one in started:
        one.stop()


def start(count: int, model: str, token_file: str, logs: Path, *more: str) -> list[Server]:
    options = [
        "--trainer-token-file",
        token_file,
        "--max-model-len",
        str(LONGEST),
        "--kv-cache-memory-bytes",
        "67108864",
        *more,
    ]
    started = [Server(["-m", "rlinvariant", "serve", model, *options], logs / str(i)) for i in range(count)]
    for one in started:
        one.wait()
    return started


def joined(*servers: Server) -> ServedSampler:
    them = [server.Server(one.url, Token(TOKEN)) for one in servers]
    return ServedSampler(them, dtype="bfloat16", max_model_len=LONGEST, eager=True, ends=[END])


def synced(sampler: ServedSampler, weights: Any) -> ServedSampler:
    sampler.sync(weights)
    assert sampler.differing_weights(weights) == []
    return sampler


def scaled(weights: Any, by: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, w.detach() * by) for name, w in weights]


def at_first_content(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Call `do` when servers have begun what they are asked for, and the first of them is waited for."""
    content, done = server.Answer.content, []

    def first(answer: server.Answer) -> Any:
        if not done:
            done.append(do())
        return content(answer)

    monkeypatch.setattr(server.Answer, "content", first)


def requests(count: int = 24) -> dict[str, Any]:
    """Ragged prompts, some of which share a prefix, with a seed and a limit each."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]
    prompts[1::4] = [prompts[0] + prompts[i] for i in range(1, count, 4)]
    most = [1 + i % 30 for i in range(count)]
    return {"prompts": prompts, "seeds": [2**62 + 7 * i for i in range(count)], "max_tokens": most}


HOW: dict[str, dict[str, Any]] = {
    "all tokens": {"temperature": 1.0},
    "warm": {"temperature": 0.7, "stop_token_ids": [5, 17, 40]},
    "greedy": {"temperature": 0.0, "stop_token_ids": [5]},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 0.9, "top_k": 7},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "all three": {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "stop_token_ids": [9]},
}


@pytest.mark.parametrize("how", HOW)
def test_servers_draw_what_an_engine_draws(how, servers, exact_engine, arithmetic_weights):
    """The control: with other weights they do not."""
    asked = requests() | HOW[how]
    exact_engine.sync(arithmetic_weights)
    expected = exact_engine.generate(**asked)
    both = synced(joined(*servers), arithmetic_weights)
    assert both.generate(**asked) == expected
    early = [c.token_ids[-1] for c, most in zip(expected, asked["max_tokens"], strict=True) if len(c.token_ids) < most]
    assert (early or how == "greedy") and set(early) <= {END, *asked.get("stop_token_ids", ())}
    one = synced(joined(servers[1]), arithmetic_weights)
    assert one.generate(**asked) == expected, "one server, or two"
    assert synced(one, scaled(arithmetic_weights, 1.01)).generate(**asked) != expected


def test_what_a_server_does_not_take_is_refused_by_name(servers, arithmetic_weights):
    sampler = synced(joined(servers[0]), arithmetic_weights)
    for setting in ({"presence_penalty": 0.5}, {"logprobs": 3}, {"n": 2}):
        with pytest.raises(UserError, match=f"^{next(iter(setting))}: expected none"):
            sampler.generate([[1]], [1], temperature=1.0, max_tokens=1, **setting)
        body = {"session": sampler._alive[0].session, "version": sampler._version, "prompts": [[1]], "seeds": [1]}
        with pytest.raises(UserError, match=f"{next(iter(setting))}: expected none"):
            sampler._alive[0].asked("generate", body | {"max_tokens": [1], "sampling": {"temperature": 1.0, **setting}})
    for wrong in ({"top_p": 2.0}, {"temperature": 0.001}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            sampler.generate([[1]], [1], **{"temperature": 1.0, "max_tokens": 1, **wrong})
    with pytest.raises(UserError, match="do not fit sampler.max_model_len=192"):
        sampler.generate([[1] * 190], [1], temperature=1.0, max_tokens=3)
    cases: list[dict[str, Any]] = [{"prompts": [[token]]} for token in (99_999, -1, "a")]
    cases += [{"seeds": [seed]} for seed in (2**63, -1)] + [{"max_tokens": [most]} for most in (1.5, True, None, 0, 2**31)]
    for wrong in cases:
        body = {"session": sampler._alive[0].session, "version": sampler._version, "prompts": [[1]], "seeds": [1]}
        with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
            sampler._alive[0].asked("generate", body | {"max_tokens": [1], "sampling": {"temperature": 1.0}, **wrong})
    settings = [{"stop_token_ids": [token]} for token in (1.5, -1, "a", 2**63)]
    settings += [{"temperature": float("nan")}, {"temperature": "1"}, {"top_p": float("nan")}, {"min_p": [1]}]
    for wrong in settings:
        body = {"session": sampler._alive[0].session, "version": sampler._version, "prompts": [[1]], "seeds": [1]}
        with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
            sampler._alive[0].asked("generate", body | {"max_tokens": [1], "sampling": {"temperature": 1.0, **wrong}})
    assert sampler.generate([[1]], [1], temperature=1.0, max_tokens=1), "and it still draws"


def test_a_wrong_token_opens_nothing(servers, arithmetic_weights):
    """The control: with the right one each of these is answered."""
    for path in sorted(WITH_TOKEN):
        for shown in ({}, {"authorization": "Bearer " + "f" * 64}, {"authorization": f"Bearer {TOKEN[:-1]}"}):
            assert httpx.post(servers[0].url + path, headers=shown, content=b"{}").status_code == 401, path
        right = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.post(servers[0].url + path, headers=right, content=b"{}").status_code in (200, 400, 409), path
    for path in ("/v1/completions", "/v1/models", "/metrics", "/docs", "/pause", "/init_weight_transfer_engine"):
        assert httpx.post(servers[0].url + path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 404
    with pytest.raises(UserError, match=f"sampler.servers={servers[0].url}: it does not take this token"):
        server.proven(server.Server(servers[0].url, Token("f" * 64)))
    assert TOKEN not in servers[0].log.read_text()


@contextmanager
def flipping(name: str, row: int, column: int) -> Iterator[None]:
    """Let the lowest bit of one number of a weight flip on its way to servers."""

    def flipped(part: dict[str, torch.Tensor]) -> list[bytes]:
        damaged = {key: w.clone() for key, w in part.items()}
        damaged[name].view(torch.int16)[row, column] ^= 1
        return [save(damaged)]

    with pytest.MonkeyPatch.context() as planted:
        planted.setattr(served, "save", flipped)
        yield


def test_a_word_that_flips_on_its_way_is_seen_and_nothing_is_drawn(servers, arithmetic_weights):
    sampler = synced(joined(*servers), arithmetic_weights)
    with flipping("model.layers.1.self_attn.k_proj.weight", 3, 5):
        sampler.sync(arithmetic_weights)
    differing = sampler.differing_weights(arithmetic_weights)
    assert sorted(x.partition(" ")[0] for x in differing) == ["model.layers.1.self_attn.qkv_proj.weight"] * 2
    assert all(one.url in " ".join(differing) for one in servers)
    with pytest.raises(UserError, match="the server holds none"):
        sampler.generate([[1]], [1], temperature=1.0, max_tokens=1)
    assert synced(sampler, arithmetic_weights).generate([[1]], [1], temperature=1.0, max_tokens=1)


@pytest.mark.parametrize("how", ["memory of this host", "HTTP"])
def test_weights_go_in_many_parts_whose_memory_is_used_again(how, servers, arithmetic_weights, monkeypatch, capfd):
    """Each way the same weights; the control is a word that flips on the way."""
    if how == "HTTP":
        monkeypatch.setattr(handover, "opened", lambda place, mark: None)
    monkeypatch.setattr(served.wire, "BUCKET_BYTES", 1 << 16)
    sampler = joined(*servers)
    assert capfd.readouterr().out.count(f"joined: weights go through {how}") == 2
    sent, send = [], served.save
    monkeypatch.setattr(served, "save", lambda part: (sent.append(len(part)), send(part))[1])
    drawn = synced(sampler, arithmetic_weights).generate([[1]], [1], temperature=1.0, max_tokens=9)
    assert len(sent) > 6 and sum(sent) == len(arithmetic_weights)
    monkeypatch.setattr(served.wire, "BUCKET_BYTES", 1 << 30)
    assert synced(joined(*servers), arithmetic_weights).generate([[1]], [1], temperature=1.0, max_tokens=9) == drawn
    with flipping("model.layers.0.mlp.down_proj.weight", 3, 5):
        sampler = joined(*servers)
        sampler.sync(arithmetic_weights)
    assert len(sampler.differing_weights(arithmetic_weights)) == 2


def test_a_trainer_that_has_lost_a_server_does_not_write_into_the_next_ones_memory(servers, arithmetic_weights):
    before, now = joined(servers[0]), joined(servers[0])
    (old,) = before._alive
    now.sync(arithmetic_weights)
    with pytest.raises(UserError, match="has since joined this server"):
        old.send([save({"model.norm.weight": torch.zeros(1)})])
    assert now.differing_weights(arithmetic_weights) == []


def test_a_completion_has_one_version_and_its_trainer_alone(servers, arithmetic_weights, monkeypatch):
    """A sync that comes while a request runs waits for it; its answer does not pass for one of any version."""
    sampler = synced(joined(servers[0]), arithmetic_weights)
    (own,), old = sampler._alive, sampler._version
    asked = requests() | HOW["all tokens"] | {"max_tokens": [100] * 24}
    expected = sampler.generate(**asked)
    body = {key: asked[key] for key in ("prompts", "seeds", "max_tokens")}
    body |= {"sampling": HOW["all tokens"] | {"stop_token_ids": [END]}}
    with ExitStack() as until_asked, monkeypatch.context() as planted:
        until_asked.enter_context(servers[0].engine_stopped())
        running = own.ask("generate", body | {"session": own.session, "version": old})
        at_first_content(planted, until_asked.close)  # of the sync
        synced(sampler, scaled(arithmetic_weights, 1.01))
    answer = running.content()
    assert answer["version"] != old and answer["version"] in (None, sampler._version)
    assert served.wire.completions_of(answer, 24) == expected, "drawn by the old weights, to the last token"
    with pytest.raises(UserError, match=f"weights {old[:12]} were asked for, and the server holds {sampler._version[:12]}"):
        own.asked("generate", body | {"session": own.session, "version": old})
    later = synced(joined(servers[0]), arithmetic_weights)
    for call in (lambda: sampler.generate(**asked), lambda: sampler.sync(arithmetic_weights)):
        with pytest.raises(UserError, match="has since joined this server; one trainer has it at a time"):
            call()
    assert later.generate(**asked) == expected


def test_a_trainer_that_goes_away_takes_its_requests_along(servers, arithmetic_weights):
    sampler = synced(joined(servers[0]), arithmetic_weights)
    (own,), asked = sampler._alive, requests() | HOW["all tokens"]
    body = {"prompts": asked["prompts"], "seeds": asked["seeds"], "max_tokens": [120] * 24, "sampling": HOW["all tokens"]}
    expected = sampler.generate(**asked)
    with servers[0].engine_stopped():
        for _ in range(3):
            own.ask("generate", body | {"session": own.session, "version": sampler._version}).close()
    assert sampler.generate(**asked) == expected
    assert synced(sampler, arithmetic_weights).generate(**asked) == expected, "a sync waits for requests that still run"
    for _ in range(3):
        own.ask("generate", body | {"session": own.session, "version": sampler._version}).close()
        sampler = synced(joined(servers[0]), arithmetic_weights)
        (own,) = sampler._alive
        assert sampler.generate(**asked) == expected, "a trainer that joins at once meets nothing of it"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 9,
        b"[]",
        b"{}",
        b'{"session": 1}',
        b"[" * 100_000,
        b'{"session": "S", "weights": [1]}',
        b'{"session": "S", "version": "V", "prompts": 1}',
    ],
)
def test_what_is_no_request_is_refused_and_changes_nothing(content, servers, arithmetic_weights):
    sampler = synced(joined(servers[0]), arithmetic_weights)
    for path in sorted(WITH_TOKEN - {"/rlinvariant/prove", "/rlinvariant/join"}):
        headers = {"authorization": f"Bearer {TOKEN}", "rlinvariant-session": sampler._alive[0].session}
        own = content.replace(b'"S"', json.dumps(sampler._alive[0].session).encode())
        own = own.replace(b'"V"', json.dumps(sampler._version).encode())
        answer = httpx.post(servers[0].url + path, headers=headers, content=own)
        assert answer.status_code in (400, 409) and answer.json()["error"], (path, answer.status_code)
    assert sampler.generate([[1]], [1], temperature=1.0, max_tokens=1)


@pytest.mark.parametrize("route", wire.KEYS)
def test_a_key_that_no_route_has_is_refused_by_name_and_changes_nothing(route, servers, arithmetic_weights):
    """Beside a request that is whole; the control is that one, by itself."""
    sampler = synced(joined(servers[0]), arithmetic_weights)
    own = sampler._alive[0]
    whole = {"trainer": "t", "ranks": {}, "mark": "m", "session": own.session, "version": sampler._version}
    whole |= {"weights": {}, "prompts": [[1]], "seeds": [1], "max_tokens": [1], "sampling": {"temperature": 1.0}}
    asked = {key: whole[key] for key in wire.KEYS[route]}
    for unknown in ("sampled", "n", "\x1b[2J", "x" * 9999):
        with pytest.raises(UserError, match=r"^sampler.servers=\S+: .*: expected no") as caught:
            own.asked(route, asked | {unknown: 1})
        assert printable(unknown)[:9] in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()
    assert sampler.generate([[1]], [1], temperature=1.0, max_tokens=1)
    assert own.asked(route, asked)


def test_a_server_that_dies_while_it_draws_is_replaced_by_another(
    arithmetic_dir, token_file, arithmetic_weights, exact_engine, tmp_path, monkeypatch, capfd
):
    started = start(2, arithmetic_dir, token_file, tmp_path)
    try:
        of_before = server.Server(started[0].url, Token(TOKEN))
        with pytest.raises(server.Gone, match="no trainer has joined this server since it was started"):
            of_before.ask("generate", {"session": "of the server that was there before"})
        sampler = synced(joined(*started), arithmetic_weights)
        asked = requests() | HOW["all tokens"]
        exact_engine.sync(arithmetic_weights)
        expected = exact_engine.generate(**asked)
        assert sampler.generate(**asked) == expected
        with started[1].engine_stopped(), monkeypatch.context() as planted:
            at_first_content(planted, started[1].process.kill)
            assert sampler.generate(**asked) == expected
        said = capfd.readouterr().err
        assert (
            f"note: sampler.servers={started[1].url}: not reached" in said and "1 server left; others draw its 12 req" in said
        )
        assert synced(sampler, arithmetic_weights).generate(**asked) == expected, "and the next steps"
        started[0].process.kill()
        with pytest.raises(ServersLost, match="^sampler.servers: none is left"):
            sampler.generate(**asked)
    finally:
        for one in started:
            one.stop()


def test_a_body_of_weights_is_safetensors_and_nothing_else(servers, arithmetic_weights):
    """A pickle in their place is refused, and not looked at; the control is what a sync sends."""
    sampler = synced(joined(servers[0]), arithmetic_weights)
    evil = b"cposix\nsystem\n(S'touch " + os.fsencode(servers[0].log.parent / "evil") + b"'\ntR."
    with pytest.raises(UserError, match="no safetensors|not"):
        sampler._alive[0].ask("sync", [evil])
    with pytest.raises(UserError, match="no safetensors|not"):
        sampler._alive[0].send([evil])
    assert not (servers[0].log.parent / "evil").exists()
    part = save({name: w.detach().bfloat16() for name, w in arithmetic_weights})
    assert load(part) and sampler._alive[0].ask("sync", [part]).content()["taken"]
    given = {name: checksums.whole(w.detach().bfloat16()) for name, w in arithmetic_weights}
    assert sampler.differing_checksums(given) == []
