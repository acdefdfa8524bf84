"""The rows of a data set, each read once as TRL will read it: what cannot be trained on is a line with the row's number."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import one_line
from rlinvariant.text import plural, shown
from rlinvariant.trainer.preflight.prompts import Prompts, Unreadable

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 4096  # read, rendered and tokenized together
UNSUPPORTED_COLUMNS = ("image", "images", "tools")
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Columns that TRL could not hand on: it calls a reward function with arguments of its own by these names."""
KEPT_COLUMNS = ("prompt", "completion")
"""Columns that TRL does not hand on to a reward function."""
FRAMES = ("arrow", "pandas", "polars")  # formats whose rows are no dicts


class Found:
    """Collects the faults of a data set's rows: of each kind the first, and how many there are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kinds: dict[str, tuple[int, str, int]] = {}
        self.fixes: dict[str, str] = {}  # of a kind, where that depends on all of its rows

    def add(self, kind: str, row: int, text: str) -> None:
        first, said, count = self.kinds.get(kind, (row, text, 0))
        self.kinds[kind] = first, said, count + 1

    def lines(self) -> list[str]:
        """Return a line for each kind, in the order of their first rows."""
        lines = []
        for (row, text, count), kind in sorted((found, kind) for kind, found in self.kinds.items()):
            fix = f"; {self.fixes[kind]}" if kind in self.fixes else ""
            more = f" ({count - 1:,} more such row{'s' if count > 2 else ''})" if count > 1 else ""
            lines.append(f"{self.name} dataset, row {row}: {text}{more}{fix}")
        return lines


def dataset_problems(dataset: object, name: str, least: int = 1, prefix: str = "") -> list[str]:
    """List what is wrong with a data set as a whole: its kind, its size, its columns. Reads no row.

    Args:
        dataset: what the user gave.
        name: "train" or "eval".
        least: fewest rows that can be used: the prompts of one rollout, of which TRL drops an incomplete one.
        prefix: what the user writes before the name of a field of TRL's configuration.
    """
    from datasets import Dataset, DatasetDict, IterableDataset

    where = f"{name} dataset"
    if not isinstance(dataset, Dataset):
        fix = "; choose a split, as in dataset['train']" if isinstance(dataset, DatasetDict) else ""
        fix = "; load it without streaming, its rows are read at the start" if isinstance(dataset, IterableDataset) else fix
        fix = "; Dataset.from_list makes one of rows" if isinstance(dataset, list) else fix
        return [f"{where}: expected a datasets.Dataset, got {type(dataset).__name__}{fix}"]
    if len(dataset) == 0:
        return [f"{where}: expected at least one row, found none"]
    columns: list[str] = dataset.column_names
    if "prompt" not in columns and dataset.format["type"] != "custom":
        return [f"{where}, row 0: no `prompt`; columns found: {shown(', '.join(columns))}"]
    found = []
    if dataset.format["type"] in FRAMES:
        found.append(f"{where}: format {dataset.format['type']}: expected rows as dicts; call dataset.reset_format()")
    text, own = "is not supported, only text prompts; drop it", "is an argument that TRL gives to reward functions; rename it"
    found += [f"{where}: column `{column}` {text}" for column in UNSUPPORTED_COLUMNS if column in columns]
    found += [f"{where}: column `{column}` {own}" for column in RESERVED_COLUMNS if column in columns]
    if len(dataset) < least:
        fix = f"add rows, or lower {prefix}per_device_train_batch_size or {prefix}gradient_accumulation_steps"
        rows, prompts = plural(len(dataset), "row"), plural(least, "prompt")
        found.append(f"{where}: {rows}, and one rollout takes {prompts}: no step could be made; {fix}")
    return found


def row_problems(dataset: "Dataset", name: str, prompts: Prompts, needed: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Read every row once, in parts, and tokenize its prompt as TRL will.

    Args:
        dataset: one in which `dataset_problems` found nothing.
        name: "train" or "eval".
        prompts: how prompts become tokens, and how long they may be.
        needed: columns that a reward function cannot do without, so that no row may lack a value.

    Returns:
        What has to be mended, and what the user should know: a line for each kind of fault, with its first row.
    """
    problems, notes = Found(name), Found(name)
    longest = 0  # tokens
    columns, kinds = f"columns found: {shown(', '.join(dataset.column_names))}", set[str]()
    for start, part in _parts(dataset, ["prompt", *needed]):
        rows, texts = [], []
        for row, prompt in enumerate(part["prompt"], start):
            if prompt is None or (isinstance(prompt, (str, list)) and not prompt):
                problems.add("none", row, f"no `prompt`, found {prompt!r}; {columns}")
                continue
            try:
                kind, text = prompts.read(prompt)
            except Unreadable as error:
                problems.add(error.kind, row, str(error))
                continue
            kinds.add(kind)
            if len(kinds) > 1:
                problems.add("mixed", row, f"{kind}, where earlier rows are not; a data set has one kind: split it in two")
                continue
            rows.append(row)
            texts.append(text)
            for note, said in prompts.remarks(prompt):
                notes.add(note, row, said)
        for row, ids in zip(rows, _tokenized(prompts, texts, "messages" in kinds, rows, problems), strict=True):
            longest = max(longest, len(ids))
            for into, faults in ((problems, prompts.faults(ids)), (notes, prompts.doubts(ids))):
                for kind, text in faults:
                    into.add(kind, row, text)
        for column in needed:
            fix = f"give it one, or let the reward function do without: {column}=None"
            for row, value in enumerate(part[column], start):
                if value is None:
                    problems.add(f"empty {column}", row, f"no value in `{column}`, which a reward function needs; {fix}")
    problems.fixes["too long"] = prompts.shortened(longest)
    return problems.lines(), notes.lines()


def _parts(dataset: Any, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Sequence[Any]]]]:
    """Yield the first row's number and the named columns of each part; no more than a part is in memory."""
    if dataset.format["type"] != "custom":  # a transform of the user's may need all columns
        dataset = dataset.select_columns(list(columns))
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        yield start, dataset[start : start + ROWS_AT_ONCE]


def _tokenized(
    prompts: Prompts, texts: Sequence[str], rendered: bool, rows: Sequence[int], problems: Found
) -> Sequence[Sequence[int]]:
    """Turn a part into tokens at once; where that fails, row by row, to name the row, which then counts as one token."""
    if not texts:
        return []
    try:
        return prompts.tokenize(texts, rendered)
    except Exception:  # a tokenizer is code of others, which may raise anything
        found: list[Sequence[int]] = []
        for row, text in zip(rows, texts, strict=True):
            try:
                found += prompts.tokenize([text], rendered)
            except Exception as error:
                problems.add("tokenizer", row, f"the tokenizer fails: {one_line(error)}; mend the row")
                found.append([prompts.ordinary])
        return found
