"""Calls in plain text: any chat template can render them, and what the model writes is read as transformers reads calls."""

from typing import Any

import pytest
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from rlinvariant.errors import UserError
from rlinvariant.tools.plain import plain_tools
from tests.recipes.hub_rows import chat_tokenizer


def look_up(word: str, page: int) -> str:
    """Find a word on a page.

    Args:
        word: the word
        page: the page
    """
    return word


def call(**arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}],
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return plain_tools(chat_tokenizer())


def rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, begin: bool = True) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=begin)


def test_a_template_without_tools_gets_them(tokenizer):
    assert not supports_tool_calling(chat_tokenizer())  # the control
    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)


def test_a_template_with_tools_tells_of_them_in_one_form():
    other = chat_tokenizer()
    other.chat_template = "{% if tools %}own form: {{ tools | tojson }}{% endif %}" + other.chat_template
    asked = [{"role": "user", "content": "u"}]
    assert "own form" in rendered(other, asked, [look_up])  # the control
    text = rendered(plain_tools(other), asked, [look_up])
    assert "call NAME" in text and "own form" not in text


def test_without_tools_the_text_is_the_models_own(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for part in (messages, messages[1:], messages[:2]):
        assert rendered(tokenizer, part) == rendered(chat_tokenizer(), part)


def test_a_conversation_with_calls(tokenizer):
    messages = [
        {"role": "user", "content": "u"},
        call(word="a b", page=3),
        {"role": "tool", "name": "look_up", "content": "one"},
        {"role": "tool", "name": "look_up", "content": "two"},
        {"role": "assistant", "content": "a"},
    ]
    assert rendered(tokenizer, messages, [look_up], begin=False) == (
        "<system>To call a tool, write\ncall NAME\nARGUMENT: VALUE\nTools:\n"
        "look_up(word, page): Find a word on a page.\n<user>u\n<assistant>call look_up\nword: a b\npage: 3\n"
        "<user>result: one\nresult: two\n<assistant>a\n"
    )
    told = [{"role": "system", "content": "s"}, *messages]
    assert rendered(tokenizer, told, [look_up]).startswith("<system>s\nTo call a tool")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("call look_up\nword: a: b\npage: 3<eos>", "", [("look_up", {"word": "a: b", "page": 3})]),
        ("so\ncall look_up\nword: x<eos>", "so", [("look_up", {"word": "x"})]),
        ("call look_up\nword: x\npage: many", "", [("look_up", {"word": "x", "page": "many"})]),
        ("call f\nx: 1\ncall g\ny: 2<eos>", "", [("f", {"x": "1"}), ("g", {"y": "2"})]),
        ("call f<eos>", "", [("f", {})]),
        ("call f\ncall g", "", [("f", {}), ("g", {})]),
        ("call me later<eos>", "call me later", []),
        ("I call f<eos>", "I call f", []),
        ("call<eos>", "call", []),
    ],
)
def test_what_a_model_writes(tokenizer, text, content, calls):
    prefix = tokenizer(rendered(tokenizer, [{"role": "user", "content": "u"}]), add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = parse_response(tokenizer, ids, prefix=prefix, tools=[look_up])
    assert read["content"] == content
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in read.get("tool_calls", [])] == calls


@pytest.mark.parametrize("other", [None, "<pad>"])
def test_a_call_ends_with_the_end_that_was_sampled_whatever_the_tokenizer_calls_its_end(other):
    own: Any = chat_tokenizer()
    own.eos_token = other or own.eos_token
    tokenizer = plain_tools(own)
    ids = tokenizer("call look_up\nword: x<eos>", add_special_tokens=False)["input_ids"]
    prefix = tokenizer(rendered(tokenizer, [{"role": "user", "content": "u"}]), add_special_tokens=False)["input_ids"]
    (read,) = parse_response(tokenizer, ids, prefix=prefix, tools=[look_up])["tool_calls"]
    assert read["function"]["arguments"] == {"word": "x"}


def test_what_is_written_is_what_is_rendered(tokenizer):
    """A call that is sampled and the same call in a prompt are the same tokens."""
    begun = rendered(tokenizer, [{"role": "user", "content": "u"}])
    whole = rendered(tokenizer, [{"role": "user", "content": "u"}, call(word="x", page=1)], begin=False)
    written = whole.removeprefix(begun).rstrip("\n")
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    prefix = tokenizer(begun, add_special_tokens=False)["input_ids"]
    (read,) = parse_response(tokenizer, ids, prefix=prefix, tools=[look_up])["tool_calls"]
    assert read["function"]["arguments"] == {"word": "x", "page": 1}


def test_a_tokenizer_that_cannot_chat_is_refused():
    bare = chat_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="tool_format=plain needs one chat template"):
        plain_tools(bare)
    silent = chat_tokenizer()
    silent.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="that begins the model's answer"):
        plain_tools(silent)
