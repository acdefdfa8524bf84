"""Draw docs/images/drift.svg: the importance ratios of the two runs recorded in notebooks/data, exact and stock.

python docs/drift.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs/images/drift.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 64, 150, 40, 44
LEAST, MOST = 0.6, 1.7  # of the ratio's axis
STOCK, EXACT, TEXT, GRID = "#c2410c", "#1f6f54", "#57606a", "#d0d7de"


def rows(run: str) -> list[dict[str, float]]:
    """Return the metrics of a recorded run, one row a step."""
    return [json.loads(line) for line in (ROOT / "notebooks/data" / run / "metrics.jsonl").read_text().splitlines()]


def ends(run: str, end: str) -> list[float]:
    """Return the smallest ("min") or largest ("max") importance ratio of each step."""
    return [row[f"onpolicy/is_ratio/{end}"] for row in rows(run)]


def total(run: str, key: str) -> int:
    """Return the sum over all steps of a metric that counts tokens."""
    return int(sum(row[f"onpolicy/{key}_tokens"] for row in rows(run)))


def figure() -> str:
    """Return the figure as SVG: a band from the smallest to the largest ratio of each step, for both runs."""
    low, high, count = ends("off", "min"), ends("off", "max"), len(rows("off"))

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / (count - 1)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (ratio - LEAST) / (MOST - LEAST)

    def path(ratios: list[float]) -> list[str]:
        return [f"{x(step):.1f},{y(ratio):.1f}" for step, ratio in enumerate(ratios)]

    def text(at_x: float, at_y: float, words: str, color: str = TEXT, anchor: str = "start") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" fill="{color}" text-anchor="{anchor}">{words}</text>'

    band = " ".join(path(low) + path(high)[::-1])
    exact = " ".join(path(ends("exact", "min")) + path(ends("exact", "max"))[::-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        "<title>Importance ratios of ten steps, with exact and with stock kernels</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 22, "trainer / sampler probability of a sampled token, smallest to largest of each step"),
    ]
    for tick in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:.1f}", anchor="end"))
    parts += [text(x(step), HEIGHT - 22, str(step + 1), anchor="middle") for step in range(count)]
    parts += [
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "step", anchor="middle"),
        f'<polygon points="{band}" fill="{STOCK}" fill-opacity="0.25" stroke="{STOCK}" stroke-width="1.5"/>',
        f'<polygon points="{exact}" fill="none" stroke="{EXACT}" stroke-width="3"/>',
        text(WIDTH - RIGHT + 10, y(1.4) - 4, "stock kernels", STOCK),
        text(WIDTH - RIGHT + 10, y(1.4) + 13, f"{total('off', 'mismatched'):,} of", STOCK),
        text(WIDTH - RIGHT + 10, y(1.4) + 30, f"{total('off', 'compared'):,} differ", STOCK),
        text(WIDTH - RIGHT + 10, y(1) - 4, "rlinvariant", EXACT),
        text(WIDTH - RIGHT + 10, y(1) + 13, f"{total('exact', 'mismatched'):,} of", EXACT),
        text(WIDTH - RIGHT + 10, y(1) + 30, f"{total('exact', 'compared'):,} differ", EXACT),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure())
    print(FIGURE, file=sys.stderr)
