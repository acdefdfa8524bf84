"""A plain form of tool calls, for models whose chat template has none: text that any template can render.

    call calculator            what the model writes: the tool's name, and a line for each argument
    expression: 12 * 7
    result: 84                 what it reads next, as the user's message

Arguments are text until the tool's type hints say otherwise: transformers makes a number of `84` for an `int`. The form is
short on purpose: a small model copies it from an example or two far more often than tags.
"""

import copy
import re
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOW = "To call a tool, write\\ncall NAME\\nARGUMENT: VALUE\\nTools:"
"""The words that the model is told, as a string of Jinja."""
MARK = "{%- set plain = namespace("
"""The beginning of every template that has the plain form."""
BEFORE = (
    MARK
    + """messages=[], told='', calls='', heard='') -%}
{%- for tool in tools or [] -%}
  {%- set function = tool.function if tool.function is defined else tool -%}
  {%- set names = (function.parameters.properties or {}) | join(', ') -%}
  {%- set plain.told = plain.told + '\\n' + function.name + '(' + names + '): ' + function.description -%}
{%- endfor -%}
{%- if plain.told -%}
  {%- set plain.told = '"""
    + HOW
    + """' + plain.told -%}
  {%- if messages and messages[0].role == 'system' -%}
    {%- set plain.messages = [{'role': 'system', 'content': messages[0].content + '\\n' + plain.told}] -%}
    {%- set messages = messages[1:] -%}
  {%- else -%}
    {%- set plain.messages = [{'role': 'system', 'content': plain.told}] -%}
  {%- endif -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- set plain.heard = plain.heard + '\\nresult: ' + message.content | string -%}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}
      {%- set plain.messages = plain.messages + [{'role': 'user', 'content': plain.heard[1:]}] -%}
      {%- set plain.heard = '' -%}
    {%- endif -%}
  {%- elif message.tool_calls -%}
    {%- set plain.calls = message.content or '' -%}
    {%- for call in message.tool_calls -%}
      {%- set function = call.function if call.function is defined else call -%}
      {%- set plain.calls = plain.calls + ('\\n' if plain.calls else '') + 'call ' + function.name -%}
      {%- for key, value in function.arguments.items() -%}
        {%- set plain.calls = plain.calls + '\\n' + key + ': ' + value | string -%}
      {%- endfor -%}
    {%- endfor -%}
    {%- set plain.messages = plain.messages + [{'role': 'assistant', 'content': plain.calls}] -%}
  {%- else -%}
    {%- set plain.messages = plain.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
{%- set tools = none -%}
"""
)
"""The part that is put before a model's own chat template: it makes messages that any template knows, and takes the tools away,
of which a template that knows tools would tell the model in a form that is not read."""


def plain_tools(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return a copy of a tokenizer whose chat template and parser know tool calls in the plain form.

    The copy is saved with the trained model, so that whoever loads that model has the same form. A tokenizer that has the form
    already stays as it is.

    Raises:
        UserError: the tokenizer has no chat template, or one that has no beginning of an answer or fails.
    """
    where = f"model={tokenizer.name_or_path}"
    own = tokenizer.chat_template
    if not isinstance(own, str):
        raise UserError(f"{where}: tool_format=plain needs one chat template; choose an instruction-tuned model")
    if own.startswith(MARK) and getattr(tokenizer, "response_template", None) is not None:
        return copy.deepcopy(tokenizer)
    asked = [{"role": "user", "content": "?"}]
    try:
        until = str(tokenizer.apply_chat_template(asked, tokenize=False))
        begun = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is code of others, which may raise anything
        raise UserError(f"{where}: the chat template fails: {one_line(error)}; choose another model") from error
    if not begun.startswith(until) or begun == until:
        fix = "choose another model, or one whose own template has tools"
        raise UserError(f"{where}: tool_format=plain needs a chat template that begins the model's answer; {fix}")
    made: Any = copy.deepcopy(tokenizer)
    made.chat_template = BEFORE + own
    # Which of them ends an answer is said by the model's generation_config.json, and a tokenizer's own eos_token may be another
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {str(tokenizer.eos_token)}
    end = f"(?:{'|'.join(map(re.escape, sorted(special)))})"
    made.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": begun[len(until) :],
        "fields": {
            "tool_calls": {
                "open_pattern": rf"(?:^|\n)call (?P<name>[A-Za-z_]\w*)(?=\n|{end}|$)",
                "close_pattern": rf"(?=\ncall )|{end}",
                "repeats": True,
                "content": "kv-lines",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": end, "content": "text"},
        },
    }
    return made
