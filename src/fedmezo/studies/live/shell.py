"""The live page before anything is in it: its places, its style and the script that fills them."""

from functools import cache

from fedmezo.studies.page import AXES, document, switch

__all__ = ["PARTS", "shell"]

PARTS = ("head", "cards", "health", "evaluation", "training", "traffic", "clients", "events")


@cache
def shell() -> str:
    """Returns the page; its script asks for `data` and loads `plotly.js`, both beside it."""
    places = {name: f'<section id="part-{name}"></section>' for name in PARTS}
    status = (
        '<div id="status" data-state="loading"><p role="status"><i class=dot></i><span id="words">Loading.</span></p>'
        '<p class=note><span id="age"></span></p><progress id="share" max="1" hidden></progress></div>'
        "<noscript><p>This page needs JavaScript.</p></noscript>"
    )
    body = "\n".join(
        [
            f"{places['head']}{status}{places['cards']}{places['health']}",
            f'<div id="drawn" hidden><h2>Evaluation</h2>{switch(AXES, chosen="rounds")}{places["evaluation"]}',
            f"<h2>Training</h2>{places['training']}<h2>Traffic and speed</h2>{places['traffic']}</div>",
            f"{places['clients']}{places['events']}",
        ]
    )
    return document(
        "fedmezo live page",
        body=body,
        figures="{}",
        plotly="",
        beside="plotly.js",
        style=_STYLE,
        script=_SCRIPT,
    )


_STYLE = """
#status{position:sticky;top:0;z-index:3;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:8px 14px;margin-top:14px;display:flex;flex-wrap:wrap;gap:0 16px;align-items:baseline}
#status p{margin:0}#words{font-weight:600}#status .note{margin-left:auto}
#status .dot{background:#8a949c}
#status[data-state=running] .dot,#status[data-state=finishing] .dot{background:#4d9a5f}
#status[data-state=ended] .dot{background:var(--accent)}
#status[data-state=stopped] .dot,#status[data-state=lost] .dot{background:#c7843a}
#status[data-state=unreadable] .dot{background:#c4503f}
progress{width:100%;height:4px;margin-top:6px;border:0;border-radius:2px;background:var(--line);appearance:none;
overflow:hidden}
progress::-webkit-progress-bar{background:var(--line)}
progress::-webkit-progress-value{background:var(--accent)}progress::-moz-progress-bar{background:var(--accent)}
.stale main>:not(#status){opacity:.55}
.health>div{display:flex;gap:14px;padding:7px 0;border-bottom:1px solid var(--line)}.health>div:last-child{border:0}
.health>div>b{flex:0 0 5.2em;font-size:.85rem;line-height:1.75}.health p{margin:0}.health p.note{margin-top:2px}
.problem{color:#cc4b3c}.warning{color:#b3741f}.good{color:#3f8a52}b.note{color:var(--soft)}
.health code{overflow-wrap:anywhere}details ul{margin:.5em 0;padding-left:1.2em;font-size:.88rem}
.figures+.note{margin-top:8px}
@media(prefers-color-scheme:dark){.problem{color:#e77a6c}.warning{color:#dca054}.good{color:#74bd87}}
@media(max-width:560px){#status{padding:7px 10px}#status .note{margin-left:0;flex-basis:100%}
.health>div{display:block}}
"""

_SCRIPT = """
document.documentElement.classList.add("js");
const at = (id) => document.getElementById(id);
const figures = {};
let cursor = "", failed = 0, timer = 0, asking = false, age = null, heard = 0;

function say(state, words) {
  at("status").dataset.state = state;
  if (at("words").textContent !== words) at("words").textContent = words;
}

function span(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function tick() {
  at("age").textContent = age === null ? "" : `last written ${span(age + (performance.now() - heard) / 1000)} ago`;
}

// Plotly writes into what it is given, so each drawing gets a copy.
function against(figure) {
  const {data, layout} = structuredClone(figure), chosen = document.querySelector(".switch :checked");
  if (chosen && data.length && data.every((trace) => trace.meta)) {
    for (const trace of data) trace.x = trace.meta[chosen.value];
    Object.assign(layout.xaxis, {title: {text: chosen.dataset.title}, type: chosen.dataset.kind});
  }
  return [data, layout];
}

function draw(id) {
  if (window.Plotly && at(id) && figures[id])
    Plotly.react(id, ...against(figures[id]), {responsive: true, displayModeBar: false});
}

function fill(name, html) {
  const place = at(`part-${name}`);
  for (const chart of place.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  const scrolls = [...place.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
  const open = [...place.querySelectorAll("details")].map((part) => part.open);
  place.innerHTML = html;
  place.querySelectorAll(".scroll").forEach((box, n) => scrolls[n] && box.scrollTo(...scrolls[n]));
  place.querySelectorAll("details").forEach((part, n) => { part.open = Boolean(open[n]); });
  return [...place.querySelectorAll(".chart")].map((chart) => chart.id);
}

function take(told) {
  const fresh = Object.assign({}, ...told.figures);
  Object.assign(figures, fresh);
  const moved = new Set(Object.keys(fresh));
  for (const [name, html] of Object.entries(told.parts)) for (const id of fill(name, html)) moved.add(id);
  at("drawn").hidden = !at("part-cards").hasChildNodes();
  moved.forEach(draw);
  cursor = told.cursor;
  if (!told.state) return;
  say(told.state, told.words);
  document.title = told.title;
  at("share").hidden = told.share === null;
  at("share").value = told.share ?? 0;
  [age, heard] = [told.age, performance.now()];
  tick();
}

async function ask() {
  if (asking || document.hidden) return;
  clearTimeout(timer);
  asking = true;
  let wait = 1;
  try {
    const reply = await fetch(`data?since=${cursor}`, {cache: "no-store", signal: AbortSignal.timeout(20000)});
    if (!reply.ok) throw reply.status;
    const told = await reply.json();
    document.documentElement.classList.remove("stale");
    failed = 0;
    wait = told.again;
    take(told);
  } catch (error) {
    failed += 1;
    wait = Math.min(2 ** (failed - 1), 10);
    document.documentElement.classList.add("stale");
    say("lost", error === 403 ? "The address has changed: open the one that `fedmezo watch` printed last."
      : "Reconnecting: `fedmezo watch` does not answer. What is shown here may be old.");
    if (error instanceof Error && !(error instanceof TypeError)) console.warn(error);
  }
  asking = false;
  timer = setTimeout(ask, 1000 * wait);
}

for (const input of document.querySelectorAll(".switch input"))
  input.addEventListener("change", () => Object.keys(figures).forEach(draw));
for (const event of ["visibilitychange", "online", "pageshow"])
  (event === "visibilitychange" ? document : window).addEventListener(event, ask);
document.addEventListener("DOMContentLoaded", () => Object.keys(figures).forEach(draw));  // Plotly is there now
setInterval(tick, 1000);
ask();
"""
