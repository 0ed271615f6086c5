"""Draws the pictures of docs/concepts.md: plain SVG text, light and dark, legible on a phone.

python scripts/pictures.py          # writes docs/pictures/*.svg; tests/test_docs_pages.py holds them to this script
"""
# ruff: noqa: RUF001 - the signs of formulas are meant as they are

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
WIDTH = 400
# A viewer takes the colours of its own scheme; each picture brings its ground along, so any page may hold it.
STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:15px;fill:#1b2430}
.small{font-size:14px}.soft{fill:#566170}.strong{font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}
.ground{fill:#fff;stroke:#d5dbe3}.halo{stroke:#fff;stroke-width:6;paint-order:stroke}.box{fill:#f1f4f8;stroke:#aab5c2}.now{fill:#fff3dc;stroke:#b26a00}
.one{fill:#dbe9fb;stroke:#1f66b5}.two{fill:#dff2e3;stroke:#2a7a42}.three{fill:#f3e3f7;stroke:#8a3ba0}
.line{fill:none;stroke:#1b2430;stroke-width:2}.thin{fill:none;stroke:#8793a2;stroke-width:1.5}
.dash{stroke-dasharray:5 4}.plus{stroke:#1f66b5}.minus{stroke:#b26a00}.dot{fill:#1b2430}
.dot.plus{fill:#1f66b5}.dot.minus{fill:#b26a00}text.plus{fill:#1f66b5;stroke:none}text.minus{fill:#9a5b00;stroke:none}
.go{fill:none;stroke:#2a7a42;stroke-width:2.5}.head{fill:#2a7a42}.tip{fill:#1b2430}
@media (prefers-color-scheme:dark){
text{fill:#e8edf3}.soft{fill:#a9b4c1}
.ground{fill:#171b22;stroke:#39424e}.halo{stroke:#171b22}.box{fill:#232a34;stroke:#64707f}.now{fill:#3a2c10;stroke:#e0a44a}
.one{fill:#152c47;stroke:#6fb0f5}.two{fill:#16321e;stroke:#70c98a}.three{fill:#33193a;stroke:#d596e6}
.line{stroke:#e8edf3}.thin{stroke:#7d8997}.plus{stroke:#6fb0f5}.minus{stroke:#e0a44a}.dot{fill:#e8edf3}
.dot.plus{fill:#6fb0f5}.dot.minus{fill:#e0a44a}text.plus{fill:#6fb0f5}text.minus{fill:#e0a44a}
.go{stroke:#70c98a}.head{fill:#70c98a}.tip{fill:#e8edf3}}
""".strip()


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Returns words whose baseline begins at (x, y)."""
    return f'<text x="{x:g}" y="{y:g}"{_class(kind)}>{escape(words, quote=False)}</text>'


def box(x: float, y: float, wide: float, high: float, kind: str = "box") -> str:
    """Returns a rectangle with round corners."""
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="5"{_class(kind)}/>'


def path(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Returns a line through points."""
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{steps}"{_class(kind)}/>'


def dot(x: float, y: float, kind: str = "dot") -> str:
    """Returns a point."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"{_class(kind)}/>'


def arrow(x: float, y: float, to_x: float, to_y: float, kind: str = "line", head: str = "tip") -> str:
    """Returns a straight arrow along one axis."""
    across = (to_x > x) - (to_x < x)
    along = (to_y > y) - (to_y < y)
    base_x, base_y = to_x - 9 * across, to_y - 9 * along
    side_x, side_y = 5 * along, 5 * across
    corners = [(to_x, to_y), (base_x + side_x, base_y + side_y), (base_x - side_x, base_y - side_y)]
    tip = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return path([(x, y), (base_x, base_y)], kind) + f'<polygon points="{tip}"{_class(head)}/>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def picture(title: str, told: str, high: int, parts: Sequence[str]) -> str:
    """Returns a whole SVG file of the common width; `title` and `told` are what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="480" height="{high * 480 // WIDTH}" '
            f'viewBox="0 0 {WIDTH} {high}" role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(title)}</title>',
            f'<desc id="d">{escape(told)}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{high - 1}" rx="8" class="ground"/>',
            *parts,
            "</svg>\n",
        ]
    )


def two_point() -> str:
    """Returns the step: two losses, the line through them, and the way the parameters go."""

    def loss(x: float) -> float:
        return 0.22 * (x - 1.1) ** 2 + 0.03 * (1.1 - x) ** 3 + 0.3

    def place(x: float, y: float) -> tuple[float, float]:
        return 200 + 84 * x, 300 - 70 * y

    middle, mu = -0.75, 0.75
    low, high = loss(middle - mu), loss(middle + mu)
    slope = (high - low) / (2 * mu)
    end = middle - 1.3 * slope
    chord = [place(middle + t, (low + high) / 2 + slope * t) for t in (-1.1, 1.1)]
    above, below, here = place(middle + mu, high), place(middle - mu, low), place(middle, loss(middle))
    axis, words = 300, 320
    parts = [
        text(16, 28, "Two losses tell the slope along z", "strong"),
        path([(16, axis), (384, axis)], "thin"),
        text(384, words, "along z", "small soft end"),
        path([place(t / 20, loss(t / 20)) for t in range(-41, 44)], "line"),
        path(chord, "thin dash"),
        *(path([at, (at[0], axis)], "thin dash") for at in (above, below, here)),
        dot(*below, "dot minus"),
        dot(*above, "dot plus"),
        dot(*here),
        text(below[0] + 10, below[1] - 6, "ℓ₋ = loss at θ − μz", "minus"),
        text(above[0] + 12, above[1] - 8, "ℓ₊ = loss at θ + μz", "plus"),
        text(below[0], words, "θ − μz", "small mid minus"),
        text(here[0], words, "θ", "mid strong"),
        text(above[0], words, "θ + μz", "small mid plus"),
        arrow(here[0], 340, place(end, 0)[0], 340, "go", "head"),
        text(place(end, 0)[0] + 8, 345, "θ − η g z", "strong"),
        text(16, 382, "1  two forward passes on the same batch: ℓ₊, ℓ₋"),
        text(16, 408, "2  slope  g = (ℓ₊ − ℓ₋) / 2μ"),
        text(16, 434, "3  step   θ ← θ − η g z"),
    ]
    told = (
        "The loss as a curve along a random direction z. It is taken at theta minus mu z and at theta plus mu z. The "
        "line through both points has the slope g, and theta moves by minus eta g z, downhill."
    )
    return picture("The two-point step", told, 452, parts)


def lanes() -> str:
    """Returns the forward pass of three clients: six settings of the adapter, one product with what is frozen."""
    kinds = ("one", "two", "three")
    parts = [text(16, 28, "Three clients, six lanes, one forward pass", "strong")]
    for lane in range(6):
        x, kind, sign = 16 + 62 * lane, kinds[lane // 2], "+−"[lane % 2]
        centre = x + 29
        parts += [
            box(x, 62, 58, 30, kind),
            text(centre, 82, "tokens", "small mid"),
            arrow(centre, 94, centre, 112),
            arrow(centre, 154, centre, 172),
            box(x, 174, 58, 46, kind),
            text(centre, 193, "A, B", "small mid"),
            text(centre, 212, f"{sign} μz", "small mid strong"),
            arrow(centre, 222, centre, 276),
            box(x, 278, 58, 30, kind),
            text(centre, 298, "ℓ₊" if sign == "+" else "ℓ₋", "mid"),
        ]
    for client in range(3):
        x = 16 + 124 * client
        parts += [
            text(x, 53, f"client {client}", "small soft"),
            path([(x + 29, 310), (x + 29, 322), (x + 91, 322), (x + 91, 310)], "thin"),
            arrow(x + 60, 322, x + 60, 342),
            text(x + 60, 360, f"slope g{'₀₁₂'[client]}", "mid strong"),
        ]
    parts += [
        box(16, 114, 368, 40),
        text(200, 139, "frozen W: one product for all tokens", "mid"),
        box(70, 236, 260, 28),
        text(200, 255, "the same in every layer", "small mid soft"),
        text(16, 392, "A lane is one setting of what is trained."),
        text(16, 416, "The model is never copied, and logits exist for"),
        text(16, 436, "answer tokens only."),
    ]
    told = (
        "The tokens of six lanes, two for each of three clients, lie end to end. The frozen weight multiplies all of "
        "them at once. Each lane has its own adapter, shifted by plus or minus mu z. Two losses make a client's slope."
    )
    return picture("Lanes", told, 450, parts)


def lockstep() -> str:
    """Returns how all parameters are trained: each weight is visited once per step."""
    states = (("W₁", "done", "two"), ("W₂", "now", "now"), ("W₃", "not yet", "box"), ("W₄", "not yet", "box"))
    parts = [text(16, 28, "Each weight is visited once per step", "strong")]
    for number, (name, state, kind) in enumerate(states):
        x = 16 + 94 * number
        parts += [
            box(x, 46, 86, 52, kind),
            text(x + 43, 68, name, "mid strong"),
            text(x + 43, 88, state, "small mid soft"),
        ]
    parts += [
        path([(110, 98), (30, 124)], "thin"),
        path([(196, 98), (370, 124)], "thin"),
        box(16, 124, 368, 262, "now"),
        text(200, 150, "1  take the step of last time, now that W₂ is read", "small mid"),
        box(96, 162, 208, 34),
        text(200, 184, "W₂ ← W₂ − η g z", "mid strong"),
        arrow(140, 198, 140, 240),
        arrow(260, 198, 260, 240),
        text(200, 224, "2  look", "small mid"),
        box(40, 242, 150, 34, "one"),
        text(115, 264, "W₂ + μ z′", "mid"),
        box(210, 242, 150, 34, "two"),
        text(285, 264, "W₂ − μ z′", "mid"),
        text(200, 298, "scratch, some rows at a time", "small mid soft"),
        arrow(115, 306, 115, 330),
        arrow(285, 306, 285, 330),
        text(115, 350, "tokens of lane +", "small mid"),
        text(285, 350, "tokens of lane −", "small mid"),
        text(200, 376, "3  products, then on to W₃", "small mid"),
        text(16, 412, "z: last step's direction; z′: this one's."),
        text(16, 438, "W₂ never holds μ z′: nothing is put back, so"),
        text(16, 458, "nothing drifts."),
    ]
    told = (
        "Four weights in a row. The first has been visited in this step, the second is being visited, the others still "
        "owe the step of last time. At the visit the weight takes the step it owes, both perturbed copies are written "
        "to scratch, and each lane's tokens are multiplied by its copy."
    )
    return picture("Lockstep", told, 476, parts)


def journal() -> str:
    """Returns the chain of records, and what can be done with it."""
    rows = (
        ("start", "configuration, sha256 of the base model", "three"),
        ("round 0", "tasks, slopes, weights, losses, events", "one"),
        ("round 1", "tasks, slopes, weights, losses, events", "one"),
        ("round 2", "tasks, slopes, weights, losses, events", "one"),
    )
    parts = [text(16, 28, "journal.sqlite: a run as a chain of records", "strong")]
    for number, (name, holds, kind) in enumerate(rows):
        y = 44 + 70 * number
        parts += [box(16, y, 368, 50, kind), text(28, y + 20, name, "strong"), text(28, y + 40, holds, "small")]
        if number:
            parts += [arrow(46, y - 20, 46, y), text(58, y - 5, "sha256 of all before", "small soft")]
    verbs = (
        ("verify", "read all, compare every digest"),
        ("resume", "replay, then round 3"),
        ("rollback", "cut at a round, go on from there"),
        ("export", "replay, write the weights out"),
    )
    parts += [
        arrow(200, 306, 200, 330),
        box(16, 332, 368, 52, "two"),
        text(200, 353, "base model + walks of rounds 0, 1, 2", "mid"),
        text(200, 374, "= the model, to the bit", "mid strong"),
    ]
    for number, (verb, does) in enumerate(verbs):
        y = 412 + 24 * number
        parts += [text(16, y, verb, "strong"), text(100, y, does, "small")]
    told = (
        "A start record with configuration and base model, then one record per round with tasks, slopes, weights, "
        "losses and events, each with the sha256 of all before. The base model and the walks give the model to the "
        "bit. The verbs verify, resume, rollback and export work on this file."
    )
    return picture("The journal", told, 500, parts)


def round_() -> str:
    """Returns one round's messages between the server and a client of its cohort."""
    server, client = 96, 304
    parts = [
        text(16, 28, "One round, for each client of the cohort", "strong"),
        path([(server, 76), (server, 470)], "thin dash"),
        path([(client, 76), (client, 470)], "thin dash"),
        box(32, 46, 128, 32, "one"),
        text(server, 67, "server", "mid strong"),
        box(224, 46, 160, 32, "two"),
        text(client, 67, "client + its data", "mid strong"),
        box(16, 92, 160, 50),
        text(server, 112, "who takes part,", "small mid"),
        text(server, 132, "rate, μ, clip", "small mid"),
        text(200, 164, "task: 96 bytes + what the model gained", "small mid halo"),
        arrow(server, 174, client, 174),
        box(224, 186, 160, 30),
        text(client, 206, "catch up by replay", "small mid"),
        box(224, 228, 160, 92, "two"),
        text(client, 249, "H times:", "mid strong"),
        text(client, 270, "z from its name,", "small mid"),
        text(client, 290, "two losses, a slope,", "small mid"),
        text(client, 310, "a step", "small mid"),
        text(200, 344, "reply: 36 + 4H bytes, the H slopes", "small mid halo"),
        arrow(client, 354, server, 354),
        box(16, 368, 200, 50),
        text(116, 388, "walks rebuilt from slopes,", "small mid"),
        text(116, 408, "θ ← θ + mean of walks", "small mid strong"),
        box(16, 428, 200, 30, "three"),
        text(116, 448, "journal: one transaction", "small mid"),
    ]
    told = (
        "The server decides who takes part and at which rate, and sends a task of 96 bytes and what the model gained. "
        "The client catches up, takes H steps, and replies with H slopes in 36 + 4 H bytes. The server rebuilds the "
        "walks, adds their mean to the model, and writes the journal."
    )
    return picture("A round's messages", told, 486, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "two-point.svg": two_point,
    "round.svg": round_,
    "lanes.svg": lanes,
    "lockstep.svg": lockstep,
    "journal.svg": journal,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
