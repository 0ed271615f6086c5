"""How the run report looks: numbers with units, tables, cards, and the style sheet and script of the page.

Every function takes plain text and returns safe HTML; `Html` marks text that is HTML already.
"""

import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "AXES",
    "DASH",
    "PALETTE",
    "SCRIPT",
    "STYLE",
    "Html",
    "bar",
    "card",
    "change",
    "count",
    "document",
    "dot",
    "duration",
    "number",
    "percent",
    "privacy_words",
    "safe",
    "size",
    "switch",
    "table",
]

DASH = "–"  # noqa: RUF001
ACCENT = "#3a8fb7"
# Readable on a white and on a nearly black page; the accent comes first.
PALETTE = (
    ACCENT,
    "#c7843a",
    "#5a9a68",
    "#b5607a",
    "#8574b8",
    "#a39150",
    "#4fa39b",
    "#a86a4a",
    "#6f87b0",
    "#8d9d4f",
    "#9b6fa3",
    "#7d8790",
    "#c46a5a",
)

# What a run is drawn against.
AXES = {
    "rounds": "Rounds done",
    "forwards": "Forward passes",
    "tokens": "Tokens",
    "seconds": "Seconds of training",
    "bytes": "Bytes both ways",
}

# Nothing may be loaded, so the browser itself refuses what a slip in a page, or in the data, would ask for.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Html(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


def safe(value: object) -> Html:
    """Returns `value` as HTML: escaped, unless it is `Html`."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """Returns `value` with so many significant digits; a dash for None, nan and infinities."""
    if value is None or not _known(value):
        return DASH
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 2, 1)}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.{max(digits - 1 - (math.floor(math.log10(abs(value))) if value else 0), 0)}f}"


def percent(value: float | None) -> str:
    """Returns a share in percent."""
    return f"{value:.1%}" if value is not None and _known(value) else DASH


def count(value: float | None) -> str:
    """Returns a whole number with thousands separated."""
    return f"{round(value):,}" if value is not None and _known(value) else DASH


def size(value: float | None) -> str:
    """Returns a number of bytes with its unit; 1 kB is 1,000 bytes."""
    if value is None or not _known(value):
        return DASH
    unit = next((at for at in (0, 1, 2, 3) if abs(value) < 1000 ** (at + 1)), 4)
    name = ("B", "kB", "MB", "GB", "TB")[unit]
    return f"{count(value) if unit == 0 else number(value / 1000**unit, 3)} {name}"


def duration(seconds: float | None) -> str:
    """Returns a time with its unit: seconds, then minutes, then hours."""
    if seconds is None or not _known(seconds):
        return DASH
    if seconds < 120:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def privacy_words(spent: Mapping[str, Any]) -> str:
    """Returns what has been spent of whose privacy, as the journal's event has it."""
    epsilon, budget = spent.get("epsilon"), spent.get("budget")
    so_far = "epsilon without bound" if epsilon is None else f"epsilon {number(epsilon, 3)}"
    limit = "" if budget is None else f" of {budget:g}"
    return f"{so_far}{limit} at delta {spent.get('delta'):g} for each {spent.get('unit')}"


def change(start: float | None, end: float | None, *, scale: float = 1.0, digits: int = 3) -> str:
    """Returns `end - start` times `scale` with its sign; a dash when either is unknown."""
    if start is None or end is None or not (_known(start) and _known(end)):
        return DASH
    amount = round((end - start) * scale, digits)
    return f"{amount:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if amount else "no change"


def card(title: str, value: str, note: str = "") -> Html:
    """Returns one key figure."""
    return Html(
        f"<div class=card><h3>{safe(title)}</h3><p class=value>{safe(value)}</p><p class=note>{safe(note)}</p></div>"
    )


def dot(name: str, *, colour: str) -> Html:
    """Returns a name with a dot of its colour before it."""
    return Html(f"<span><i class=dot style='background:{colour}'></i>{safe(name)}</span>")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> Html:
    """Returns a table that scrolls inside its own box; the first `texts` columns are text, the others numbers."""
    kinds = ["" if at < texts else " class=n" for at in range(len(heads))]
    head = "".join(f"<th scope=col{kind}>{safe(name)}</th>" for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{safe(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return Html(
        f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(parts: Sequence[tuple[str, float, str]]) -> Html:
    """Returns one stacked bar from (label, amount, colour); its text is in the tooltip and for screen readers."""
    total = sum(amount for _, amount, _ in parts)
    if not total:
        return Html(DASH)
    words = safe(", ".join(f"{label}: {count(amount)}" for label, amount, _ in parts))
    spans = "".join(
        f"<i style='width:{100 * amount / total:.2f}%;background:{colour}'></i>" for _, amount, colour in parts
    )
    return Html(f"<span class=bar role=img title='{words}' aria-label='{words}'>{spans}</span>")


def switch(axes: Mapping[str, str], *, chosen: str, logs: Collection[str] = (), group: str = "axis") -> Html:
    """Returns the choice of what the charts of its section, or of a page with one choice, are drawn against.

    Args:
      axes: axis -> title.
      chosen: the one at first.
      logs: those with a log scale.
      group: another one for each choice of a page.
    """
    marks = [
        f"<label><input type=radio name={group} value={axis} data-title='{safe(title)}' "
        f"data-kind={'log' if axis in logs else 'linear'}{' checked' if axis == chosen else ''}>"
        f"<span>{safe(title)}</span></label>"
        for axis, title in axes.items()
    ]
    return Html(f"<fieldset class=switch><legend>Drawn against</legend>{''.join(marks)}</fieldset>")


def document(
    title: str,
    *,
    body: str,
    figures: str,
    plotly: str,
    style: str = "",
    beside: str = "",
    script: str = "",
) -> str:
    """Returns a whole page that needs no network.

    Args:
      title: plain text.
      body: HTML.
      figures: `figures_json` of the charts in it.
      plotly: Plotly's script.
      style: more rules, after the house's.
      beside: a file beside the page that holds Plotly's script, for pages that share one; `plotly` is empty then.
      script: takes the place of the script that draws `figures`; it may ask where the page came from for more.
    """
    policy = _POLICY.replace("script-src", "script-src 'self'") if beside else _POLICY
    policy += "; connect-src 'self'" if script else ""
    # What asks for more need not wait for Plotly before its first words.
    waits = " defer" if script else ""
    loaded = f'<script{waits} src="{safe(beside)}"></script>' if beside else f"<script>{plotly}</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>{body}\n"
        f'</main><script type="application/json" id="figures">{figures}</script>\n'
        f"{loaded}\n<script>{script or SCRIPT}</script></body></html>\n"
    )


STYLE = """
:root{--page:#fbfbfa;--card:#fff;--ink:#1f262c;--soft:#5d6872;--line:#e2e5e8;--accent:#1f7299;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1b1f23;--ink:#e4e8eb;--soft:#9aa5ae;--line:#2e343a;
--accent:#64b2d6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 56px}
h1{font-size:1.55rem;line-height:1.25;margin:.1em 0 .3em;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2em 0 .7em;padding-top:1.1em;border-top:1px solid var(--line);font-weight:650}
h3{font-size:.82rem;margin:0;color:var(--soft);font-weight:550}
p{margin:.3em 0;overflow-wrap:anywhere}.lead{max-width:75ch}
.kicker{color:var(--accent);font-weight:650;font-size:.85rem}
.note,.lead small,figcaption span{color:var(--soft);font-size:.82rem}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));margin-top:22px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:13px 15px;min-width:0}
.value{font-size:1.3rem;font-weight:620;font-variant-numeric:tabular-nums;margin:.1em 0 0;line-height:1.35}
.card .note{margin:0}
.figures{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.scroll+.figures{margin-top:14px}.wide{grid-column:1/-1}
figure{margin:0}figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline}figcaption b{margin-right:auto}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.4em}
.chart{width:100%;display:none}.js .chart{display:block}
.switch{display:none;flex-wrap:wrap;border:0;padding:0;margin:0 0 12px;gap:6px}.js .switch{display:flex}
.switch legend{float:left;color:var(--soft);font-size:.85rem;padding:3px 8px 0 0}
.switch input{position:absolute;opacity:0}.switch label{cursor:pointer}
.switch span{display:block;border:1px solid var(--line);border-radius:99px;padding:2px 12px;font-size:.85rem}
.switch :checked+span{border-color:var(--accent);color:var(--accent);font-weight:600}
.switch :focus-visible+span{outline:2px solid var(--accent);outline-offset:2px}
.scroll{overflow:auto;max-height:30rem;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:middle}
tr:last-child td{border-bottom:0}th{position:sticky;top:0;background:var(--card);color:var(--soft);
font-weight:550;z-index:1}
th.n,td.n{text-align:right;white-space:nowrap}
.bar{display:inline-flex;width:130px;height:11px;border-radius:3px;overflow:hidden;vertical-align:middle}
.bar i{display:block;height:100%}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;margin:.6em 0;font-size:.82rem;color:var(--soft)}
pre,code{font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 15px;
overflow:auto;max-height:34rem;margin:.5em 0}
td code{overflow-wrap:anywhere}details{margin-top:12px}summary{cursor:pointer;color:var(--accent)}
details>*+*{margin-top:10px}
.js-plotly-plot text{fill:var(--ink)!important}
.js-plotly-plot .gridlayer path,.js-plotly-plot .zl{stroke:var(--line)!important}
.hoverlayer .hovertext path,.hoverlayer rect.bg{fill:var(--card)!important;stroke:var(--line)!important}
@media(max-width:560px){main{padding:18px 12px 40px}.cards{grid-template-columns:1fr 1fr;gap:8px}.card{padding:10px}
.value{font-size:1.05rem}figure{padding:10px 6px}figcaption,figure .note{padding:0 6px}th,td{padding:5px 8px}}
"""

SCRIPT = """
document.documentElement.classList.add("js");
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures))
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
const alone = document.querySelectorAll(".switch").length === 1;
for (const input of document.querySelectorAll(".switch input"))
  input.addEventListener("change", () => {
    const place = alone ? document : input.closest("section");
    for (const [id, figure] of Object.entries(figures)) {
      if (!place.contains(document.getElementById(id)) || !figure.data.every((trace) => trace.meta)) continue;
      const x = figure.data.map((trace) => trace.meta[input.value]);
      const dtick = input.dataset.kind === "log" ? 1 : null;
      Plotly.update(id, {x}, {"xaxis.title.text": input.dataset.title, "xaxis.type": input.dataset.kind,
        "xaxis.dtick": dtick});
    }
  });
"""
