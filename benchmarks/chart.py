"""The chart of a benchmark as an SVG, drawn by hand so that it needs no plotting library."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

_COLOURS = {"ours": "#0b6e4f", "ours-packed": "#08a045"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second for each variant of each workload; ours in green."""
    rows = []
    for name, result in report["workloads"].items():
        fastest = max(row["tokens_per_second"] for row in result["variants"].values())
        rows.append((f"workload {name}", None, 0.0))
        for variant, row in result["variants"].items():
            rows.append((variant, row["tokens_per_second"], row["tokens_per_second"] / fastest))
    height = 22 * len(rows) + 20
    body = []
    for index, (label, value, share) in enumerate(rows):
        y = 20 + 22 * index
        if value is None:
            body.append(f'<text x="10" y="{y}" font-weight="bold">{escape(label)}</text>')
            continue
        colour = _COLOURS.get(label, "#9aa5b1")
        body.append(f'<text x="20" y="{y}">{escape(label)}</text>')
        body.append(f'<rect x="180" y="{y - 12}" width="{400 * share:.1f}" height="15" fill="{colour}"/>')
        body.append(f'<text x="{186 + 400 * share:.1f}" y="{y}">{value:,.0f} tokens/s</text>')
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" font-size="12" '
        f'font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )
