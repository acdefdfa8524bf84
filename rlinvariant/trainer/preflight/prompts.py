"""A prompt as TRL reads it: its text, through the chat template if it is messages, its tokens, and what is wrong with them."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlinvariant.errors import one_line
from rlinvariant.text import shown

TEMPLATE = "choose an instruction-tuned model, save the tokenizer with a chat_template, or give prompts as text"


class Unreadable(Exception):
    """Says why a prompt cannot be read; `kind` is one word for all prompts of which the same can be said."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Prompts:
    """Says how prompts become tokens, and which tokens a model can take.

    Args:
        tokenizer: the run's tokenizer.
        vocabulary: rows of the model's embedding; None: not known.
        longest: most tokens of a prompt and its completion; None: not known.
        completion: most tokens of a completion.
        template_kwargs: further arguments of the chat template.
        limit: what decides `longest`, in words.
        prefix: what the user writes before the name of a field of TRL's configuration.
        tools: what the chat template is told of tools, as JSON schemas; None: there are none.
    """

    tokenizer: Any
    vocabulary: int | None = None
    longest: int | None = None
    completion: int = 0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    limit: str = "the model's positions"
    prefix: str = ""
    tools: Sequence[Any] | None = None

    def read(self, prompt: object) -> tuple[str, str]:
        """Return the kind of a prompt, text or messages, and the text that is tokenized. Raises Unreadable."""
        if isinstance(prompt, str):
            _require_text("prompt", prompt)
            if self.tools:
                raise Unreadable(
                    "text", "`prompt` is text, and tools need chat messages; write [{'role': 'user', 'content': ...}]"
                )
            return "text", prompt
        if not isinstance(prompt, list):
            found = f"{type(prompt).__name__} {shown(prompt, 60)}"
            raise Unreadable("type", f"`prompt` is {found}: expected text, or a list of messages")
        for number, message in enumerate(prompt):
            _require_message(f"message {number}", message)
        if not any(message["content"].strip() for message in prompt):
            raise Unreadable("blank", "blank messages: expected text in one of them")
        if not getattr(self.tokenizer, "chat_template", None):
            raise Unreadable("no template", f"messages, and the tokenizer has no chat template; {TEMPLATE}")
        for number, message in enumerate(prompt):
            if self._special and (special := self._special.search(message["content"])):
                what = f"message {number} has the special token {special.group()!r} as text, which would end or fake a turn"
                raise Unreadable("special token", f"{what}; take it out, or drop the row")
        return "messages", self._rendered(prompt)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        """Return what the chat template makes of messages. Raises Unreadable where it fails, or leaves one out."""
        text = self._template(messages)
        for number, message in enumerate(messages):
            said = message["content"].strip()
            if message["role"] in ("assistant", "tool") or not said or said in text:
                continue  # templates cut an assistant's reasoning, and rewrite what a tool says
            if self._template([*messages[:number], {**message, "content": ""}, *messages[number + 1 :]]) == text:
                fix = "mend the role, or choose another template"
                raise Unreadable("left out", f"the chat template leaves out message {number}, role {message['role']!r}; {fix}")
        return text

    def _template(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, add_generation_prompt=True, tokenize=False, **self.template_kwargs
            )
        except Exception as error:  # a template is code of others, which may raise anything
            cause, fix = (
                f"{type(error).__name__}: {one_line(error)}",
                "mend the row, or save the tokenizer with another template",
            )
            raise Unreadable("template", f"the chat template fails: {cause}; {fix}") from error

    def tokenize(self, texts: Sequence[str], rendered: bool) -> Sequence[Sequence[int]]:
        """Return the token ids of each text; a template has written the special tokens itself."""
        special = {"add_special_tokens": False} if rendered else {}
        return self.tokenizer(text=list(texts), return_attention_mask=False, verbose=False, **special)["input_ids"]

    def faults(self, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield the kind and a description of each reason why a prompt of these tokens cannot be trained on."""
        if not ids:
            yield "empty", "a prompt without tokens: is the model's tokenizer there?"
        elif self._unknown is not None and self._unknown in ids and not set(ids) - self._known_alone:
            yield "unknown", "the tokenizer knows no character of the prompt; drop the row, or choose another model"
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            which = f"token {max(ids)}, and the model has embeddings for {self.vocabulary:,}"
            yield "vocabulary", f"{which}: tokenizer and model do not belong together"
        if self.longest is not None and len(ids) + self.completion > self.longest:
            room = f"{self.limit} = {self.longest:,} less {self.prefix}max_completion_length={self.completion:,}"
            yield "too long", f"a prompt of {len(ids):,} tokens, and {room} leaves room for {self.longest - self.completion:,}"

    def shortened(self, longest: int) -> str:
        """Return what mends prompts that are too long, of which the longest has so many tokens."""
        room, drop = (self.longest or 0) - longest, "drop the longer prompts"
        return f"lower it to {room:,}, or {drop}" if room > 0 else drop

    def doubts(self, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield the kind and a description of what can be trained on, but is seldom meant."""
        if self._unknown is not None and self._unknown in ids and set(ids) - self._known_alone:
            yield "unknown", f"characters that the tokenizer does not know: the model sees {self.tokenizer.unk_token}"
        start = self.tokenizer.bos_token_id
        if start is not None and list(ids[:2]) == [start, start]:
            yield "twice", f"{self.tokenizer.bos_token} twice: the tokenizer puts it before a text that begins with it"

    def remarks(self, prompt: object) -> Iterator[tuple[str, str]]:
        """Yield what should be known of a prompt's text."""
        if isinstance(prompt, str) and self._special and (special := self._special.search(prompt)):
            yield "special", f"{special.group()!r} in the text is the special token, as in a text that a template has made"

    @functools.cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Return the special tokens, as text; None where text is never read as one."""
        if getattr(self.tokenizer, "split_special_tokens", False):
            return None
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        words = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None

    @functools.cached_property
    def _unknown(self) -> int | None:
        """Return the token of what the tokenizer does not know; None where it knows every byte, and unk stands for another."""
        others = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return None if self.tokenizer.unk_token_id in others else self.tokenizer.unk_token_id

    @functools.cached_property
    def _known_alone(self) -> set[int]:
        """Return the tokens that say nothing by themselves: unknown, and those that stand at the beginning or the end."""
        tokenizer = self.tokenizer
        return {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}

    @property
    def ordinary(self) -> int:
        """Return a token in which no fault is found."""
        return next(i for i in range(2**31) if i not in self._known_alone)


def _require_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise Unreadable("message", f"{where} is {type(message).__name__} {shown(message, 60)}: expected role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = shown(message.get(key), 60)
            raise Unreadable(key, f"{where}: `{key}` is {found}: expected text")
    if not message["role"].strip():
        raise Unreadable("role", f"{where}: a blank `role`: expected user, assistant, system, ...")
    if "\0" in message["content"]:
        raise Unreadable("NUL", f"{where}: a NUL character: is it damaged? take it out")


def _require_text(where: str, text: str) -> None:
    if not text.strip():
        raise Unreadable("blank", f"a blank `{where}` {shown(repr(text), 60)}: expected text")
    if "\0" in text:
        raise Unreadable("NUL", f"`{where}` has a NUL character: is it damaged? take it out")
