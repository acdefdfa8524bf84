"""Count what differs among a demo's completions, and say it in words."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinvariant.rollout import Completion
from rlinvariant.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = 100  # different completions whose tokens are kept


def measured(completions: Sequence[Completion], alone: Completion, tokenizer: "PreTrainedTokenizerBase") -> JsonObject:
    """Count what differs among one engine's completions; log-probs are compared by their bits.

    Args:
        completions: of the same prompt, all of one length.
        alone: the completion that was drawn with no other request in the engine.
        tokenizer: decodes tokens.

    Positions count from 1; a first difference of None means that there is none. `of` has the number of each completion's text,
    the most frequent first, and `texts` the tokens of the first TEXTS of them.
    """
    tokens = [tuple(c.token_ids) for c in completions]
    words = [tuple(x.hex() for x in c.sampler_logprobs) for c in completions]
    counts = Counter(tokens)
    at = first_difference(tokens)
    numbers = {row: i for i, (row, _) in enumerate(counts.most_common())}
    branches = Counter(t[at - 1] for t in tokens).most_common(8) if at else []
    return {
        "completions": len(completions),
        "unique": len(counts),
        "first_token": at,
        "unique_logprobs": len(set(words)),
        "first_logprob": first_difference(words),
        "as_alone": tokens.count(tuple(alone.token_ids)),
        "logprobs_as_alone": words.count(tuple(x.hex() for x in alone.sampler_logprobs)),
        "branches": [[tokenizer.decode([token]), count] for token, count in branches],
        "unique_by_token": growth(tokens),
        "unique_logprobs_by_token": growth(words),
        "of": [numbers[row] for row in tokens],
        "texts": [[tokenizer.decode([token]) for token in row] for row in list(numbers)[:TEXTS]],
    }


def first_difference(rows: Sequence[tuple[object, ...]]) -> int | None:
    """Return the first position, from 1, at which not all rows have the same; None if there is none."""
    return next((i for i, column in enumerate(zip(*rows, strict=True), 1) if len(set(column)) > 1), None)


def growth(rows: Sequence[tuple[object, ...]]) -> list[int]:
    """Return how many different beginnings the rows have, at each length from 1."""
    return [len({row[:length] for row in rows}) for length in range(1, len(rows[0]) + 1)]


def summary(result: JsonObject) -> list[str]:
    """Say in lines what each engine did, and what exactness cost."""
    lines, arms = [], result["arms"]
    for name, arm in arms.items():
        counted = [
            f"{arm[key]:,} unique{what}, " + (f"first differing at token {arm[first]}" if arm[first] else "no difference seen")
            for what, key, first in (("", "unique", "first_token"), (" in log-probs", "unique_logprobs", "first_logprob"))
        ]
        lines.append(f"{name + ':':<6} {arm['completions']:,} completions: {'; '.join(counted)}")
        lines.append(f"       {arm['as_alone']:,} as when alone, {arm['logprobs_as_alone']:,} of them to the last bit")
        if arm["branches"]:
            said = ", ".join(f"{text!r} {count:,} times" for text, count in arm["branches"])
            lines.append(f"       token {arm['first_token']}: {said}")
    stock, ours = arms["stock"], arms["ours"]
    lines.append(
        f"speed: stock {stock['tokens_per_s']:,.0f} tokens/s, ours {ours['tokens_per_s']:,.0f}: "
        f"{ours['tokens_per_s'] / stock['tokens_per_s']:.2f}x; traffic: {ours['others']:,} other requests, "
        f"{ours['cancelled']:,} of them cancelled, {ours['fewest']} to {ours['most']} at once"
    )
    return lines
