"""Numbers in sentences, each in one way everywhere."""


def plural(count: int, noun: str, many: str = "") -> str:
    """Return a count with its noun: `1 seed`, `2 seeds`, `1,200 tokens`; `many` is the plural where an s is not enough."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def percent(share: float) -> str:
    """Return a share of 1 in per cent, with one decimal: `68.8 %`."""
    return f"{100 * share:.1f} %"
