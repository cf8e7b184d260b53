"""Bar charts as plain SVG, readable on light and on dark ground."""
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 720, 150, 90, 20, 8, 56
STYLE = """<style>
text { font: 13px sans-serif; fill: #24292f } .title { font-weight: bold; font-size: 15px }
.note { font-size: 10px; fill: #6e7781 } .other { fill: #8c959f } .mine { fill: #0969da }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .note { fill: #8d96a0 }
.other { fill: #6e7681 } .mine { fill: #4493f8 } }
</style>"""


def number(value):
    if value is None:
        return "-"
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def bars(title, unit, less, values, notes):
    """A chart of `values`, by name; the bar of nodupe stands out."""
    height = TOP + len(values) * (BAR + GAP) + 14 * len(notes) + 14
    most = max(values.values()) or 1
    hint = "less is better" if less else "more is better"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
             f'viewBox="0 0 {WIDTH} {height}" role="img">', f"<title>{escape(title)}</title>", STYLE,
             f'<text class="title" x="12" y="22">{escape(title)}</text>',
             f'<text class="note" x="12" y="40">{escape(unit)}; {hint}</text>']
    at = TOP
    for name, value in values.items():
        length = max(1, value / most * (WIDTH - LEFT - RIGHT))
        parts += [f'<text x="{LEFT - 10}" y="{at + 15}" text-anchor="end">{escape(name)}</text>',
                  f'<rect class="{"mine" if name.startswith("nodupe") else "other"}" x="{LEFT}" y="{at}" '
                  f'width="{length:.1f}" height="{BAR}" rx="2"/>',
                  f'<text x="{LEFT + length + 8:.1f}" y="{at + 15}">{number(value)}</text>']
        at += BAR + GAP
    for note in notes:
        at += 14
        parts.append(f'<text class="note" x="12" y="{at}">{escape(note)}</text>')
    return "\n".join(parts + ["</svg>", ""])
