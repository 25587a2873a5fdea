"""The report: one HTML page that shows what tuning found. No script, no network; readable on a phone, in print and in the dark.

Everything that comes from a database is escaped: a row may come from a stranger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from adasplash_tuner.report.data import ReportData, SearchReport
from adasplash_tuner.storage.records import ConfigValues

TIMES = "\N{MULTIPLICATION SIGN}"
_MOST_REFUSED = 60
_FAINTEST, _STRONGEST = 0.10, 0.78  # a cell's colour, by how far its speed is from the default's


def render(data: ReportData, made: datetime | None = None) -> str:
    """The page as text."""
    made = made or datetime.now(UTC)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(_body(data, made))
    # The policy forbids the page to load or run anything, whatever a database row says.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Tuned for {escape(", ".join(data.devices) or "nothing yet")}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _body(data: ReportData, made: datetime) -> Iterator[str]:
    yield '<header class="hero"><div>'
    yield "<h1>Entmax attention, tuned</h1>"
    for device in data.devices:
        yield f"<p>{escape(device)}</p>"
    versions = sorted({s.best.version for s in data.searches})
    by = f" · adasplash-core {escape(', '.join(versions))}" if versions else ""
    yield f'<p class="soft">{made:%Y-%m-%d %H:%M} UTC{by}</p></div>'
    if data.searches:
        count = len(data.searches)
        yield f'<div class="gain"><div class="big num">{data.gain:.2f}{TIMES}</div>'
        mean = f"geometric mean of {count} {_plural(count, 'search', 'searches')}"
        yield f'<div class="soft">the default&rsquo;s speed, {mean}</div></div>'
    yield "</header>"
    if not data.searches:
        yield '<section class="card"><p>Nothing is tuned yet. <code>adasplash tune --gpu-auto</code> fills this page.</p></section>'
    else:
        yield from _overview(data)
    for number, search in enumerate(data.searches):
        yield from _search(search, number)
    if data.notes:
        yield '<section class="card"><h2>Not shown above</h2>'
        yield from (f"<p>{escape(note)}</p>" for note in data.notes)
        yield "</section>"


def _overview(data: ReportData) -> Iterator[str]:
    most = max(0.25, *(s.best.gain - 1 for s in data.searches))
    yield '<section class="card"><h2>Gain per shape</h2>'
    yield (
        '<p class="hint">How many times as fast as the default config the chosen one is, timed in turns; a bar shows what lies above '
        f"1{TIMES}. Where nothing was faster beyond the noise the default stays, and there is no bar.</p>"
    )
    yield '<div class="overview">'
    for number, search in enumerate(data.searches):
        best = search.best
        width = 100 * max(best.gain - 1, 0.0) / most
        yield (
            f'<div class="row"><span><a href="#s{number}">{_shape(best.shape)}</a></span>'
            f"<span>{escape(best.key.backend)} {escape(best.key.pass_)}</span>"
            f'<span class="track"><b style="width:{width:.1f}%"></b></span><span class="num">{best.gain:.2f}{TIMES}</span></div>'
        )
    yield "</div></section>"


def _search(search: SearchReport, number: int) -> Iterator[str]:
    best = search.best
    won = not search.is_default and best.gain > 1
    badge = f"{best.gain:.2f}{TIMES} the default" if won else "the default is the best"
    yield f'<section class="card" id="s{number}"><div class="head"><h2>{_shape(best.shape)}</h2>'
    yield f'<span class="badge{" won" if won else ""}">{badge}</span></div>'
    yield f'<p class="soft">{escape(best.key.backend)} {escape(best.key.pass_)} · {escape(best.inputs)} · {_day(best.measured_at)}</p>'
    yield '<dl class="facts">'
    yield from (f'<div><dt>{name}</dt><dd class="num">{value}</dd></div>' for name, value in _facts(search))
    yield "</dl>"
    if search.by_input:
        yield from _classes(search)
    varied = sorted(search.varied(), key=search.influence, reverse=True)
    if varied:
        yield '<div class="two"><div>'
        yield from _marginals(search, varied)
        yield "</div><div>"
        if len(varied) > 1:
            yield from _plane(search, varied[0], varied[1])
        yield "</div></div>"
    if len(search.tried) > 1:
        yield from _ranking(search)
    yield from _config_table(search)
    if search.refused:
        yield from _refused(search)
    yield "</section>"


def _facts(search: SearchReport) -> Iterator[tuple[str, str]]:
    best = search.best
    yield "default", f"{_ms(best.default_ms)} ms"
    yield "chosen", f"{_ms(best.median_ms)} ms"
    if search.gain_interval is not None and best.gain > 1:
        low, high = search.gain_interval
        yield "gain, with its noise", f"{low:.2f} to {high:.2f}{TIMES}"
    yield "spread of a run", f"{100 * best.spread_ms / best.median_ms:.1f} %"
    bound = f" of {search.error_bound:.1e}" if search.error_bound is not None else ""
    yield "error against float64", f"{best.error:.1e}{bound}"
    total = len(search.tried) + len(search.refused) + search.left
    yield "configs timed", f"{len(search.tried)} of {total}"


def _classes(search: SearchReport) -> Iterator[str]:
    longest = max(max(t.default_ms, t.best_ms) for t in search.by_input)
    yield "<h3>On each input</h3>"
    yield '<p class="hint">Default above, chosen below. A config is taken only if it is slower on none of them.</p>'
    yield '<div class="classes">'
    for times in search.by_input:
        before, now = (f"{100 * ms / longest:.1f}%" for ms in (times.default_ms, times.best_ms))
        yield (
            f'<span>{escape(times.label)}</span><span class="pair"><span class="track"><b class="same" style="width:{before}"></b>'
            f'</span><span class="track"><b style="width:{now}"></b></span></span><span class="num">{_ms(times.default_ms)} &rarr; '
            f"{_ms(times.best_ms)} ms, {times.default_ms / times.best_ms:.2f}{TIMES}</span>"
        )
    yield "</div>"


def _marginals(search: SearchReport, names: Sequence[str]) -> Iterator[str]:
    yield "<h3>What each parameter does</h3>"
    yield '<p class="hint">Speed of the best config with each value, against the default; parameters that decide most come first.</p>'
    yield _legend(search)
    yield '<div class="fields">'
    far = _farthest(search)
    for name in names:
        yield f'<div class="field"><span class="name">{escape(name)}</span><span class="cells">'
        for value, speed, count in search.marginals(name):
            marks = _marks(search, {name: value})
            title = f"{count} {_plural(count, 'config', 'configs')} with {name} = {value}"
            yield (
                f'<span class="cell{marks}" style="{_colour(speed, far)}" title="{escape(title)}"><b>{escape(_shown(value))}</b>'
                f"<small>{speed:.2f}{TIMES}</small></span>"
            )
        yield "</span></div>"
    yield "</div>"


def _plane(search: SearchReport, down: str, across: str) -> Iterator[str]:
    """The two parameters that decide most, against each other."""
    rows = [value for value, _, _ in search.marginals(down)]
    columns = [value for value, _, _ in search.marginals(across)]
    best: dict[tuple[Any, Any], float] = {}
    for tried in search.tried:
        if down in tried.config and across in tried.config:
            place = (tried.config[down], tried.config[across])
            best[place] = max(best.get(place, 0.0), tried.speed)
    far = _farthest(search)
    yield f"<h3><code>{escape(down)}</code> against <code>{escape(across)}</code></h3>"
    yield '<p class="hint">The two that decide most: speed of the best config in each place; a dot where none was timed.</p>'
    corner = f"{escape(down)} &darr;<br>{escape(across)} &rarr;"
    yield f'<div class="scroll"><table class="plane"><thead><tr><th>{corner}</th>'
    yield from (f"<th>{escape(_shown(value))}</th>" for value in columns)
    yield "</tr></thead><tbody>"
    for row in rows:
        yield f"<tr><th>{escape(_shown(row))}</th>"
        for column in columns:
            speed = best.get((row, column))
            marks = _marks(search, {down: row, across: column})
            if speed is None:
                yield f'<td class="none{marks}">·</td>'
            else:
                yield f'<td class="{marks.strip()}" style="{_colour(speed, far)}">{speed:.2f}{TIMES}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def _ranking(search: SearchReport) -> Iterator[str]:
    """Every timed config from the fastest to the slowest: per cent coordinates, so that the text keeps its size on a phone."""
    speeds = [tried.speed for tried in search.tried]
    low, high = math.log(min(*speeds, 1.0)), math.log(max(*speeds, 1.0))
    low, high = low - 0.06 * (high - low + 0.02), high + 0.12 * (high - low + 0.02)

    def height(speed: float) -> float:
        return 92 - 84 * (math.log(speed) - low) / (high - low)

    yield "<h3>Every config that was timed</h3>"
    yield (
        '<p class="hint">Fastest to the left. Most have one sample; only those that lead are timed again, and the last few in turns '
        "with the default. Point at a dot to see its config.</p>"
    )
    yield '<svg class="plot" role="img" aria-label="Speed of every timed config against the default">'
    for speed in _ticks(math.exp(low), math.exp(high)):
        kind = "even" if speed == 1 else "grid"
        at = f"{height(speed):.1f}%"
        yield f'<line class="{kind}" x1="0" x2="100%" y1="{at}" y2="{at}"/><text x="0" y="{at}" dy="-3">{speed:.2f}{TIMES}</text>'
    last = max(len(search.tried) - 1, 1)
    for index, tried in enumerate(search.tried):
        classes, label, radius = _dot(search, tried.config, tried.speed)
        x, y = 12 + 86 * index / last, height(tried.speed)
        words = f"{_ms(tried.ms)} ms, {tried.speed:.2f}{TIMES}: {_words(tried.config)}"
        yield f'<circle class="{classes}" cx="{x:.2f}%" cy="{y:.1f}%" r="{radius}"><title>{escape(words)}</title></circle>'
        if label:
            side = 'dx="9" text-anchor="start"' if x < 60 else 'dx="-9" text-anchor="end"'
            yield f'<text class="label" x="{x:.2f}%" y="{y:.1f}%" dy="-8" {side}>{label}</text>'
    yield "</svg>"


def _dot(search: SearchReport, config: ConfigValues, speed: float) -> tuple[str, str, float]:
    if search.is_winner(config):
        return "won", "chosen" if not search.is_default else "the default, chosen", 7
    if config == search.default:
        return "was", "default", 6
    return ("fast" if speed > 1 else "slow"), "", 4.5


def _ticks(low: float, high: float) -> list[float]:
    """A few round speeds between, 1 among them."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0):
        first, last = math.ceil((low - 1) / step), math.floor((high - 1) / step)
        if last - first <= 5:
            return [value for n in range(first, last + 1) if (value := 1 + n * step) > 0]
    return [1.0]


def _config_table(search: SearchReport) -> Iterator[str]:
    default = search.default
    yield "<details><summary>The chosen config</summary>"
    yield '<table class="plain"><thead><tr><th>parameter</th><th>chosen</th><th>default</th></tr></thead><tbody>'
    for name, value in search.best.config.items():
        before = None if default is None else default.get(name)
        changed = ' class="changed"' if default is not None and before != value else ""
        yield f"<tr><td><code>{escape(name)}</code></td><td{changed}>{escape(_shown(value))}</td>"
        yield f"<td>{escape(_shown(before)) if default is not None else '?'}</td></tr>"
    yield "</tbody></table></details>"


def _refused(search: SearchReport) -> Iterator[str]:
    count = len(search.refused)
    yield f"<details><summary>{count} {_plural(count, 'config was', 'configs were')} not admitted</summary>"
    yield '<table class="plain"><thead><tr><th>config</th><th>why</th></tr></thead><tbody>'
    base = search.default or search.best.config
    for refused in search.refused[:_MOST_REFUSED]:
        words = _words({k: v for k, v in refused.config.items() if base.get(k) != v}) or _words(refused.config)
        yield f"<tr><td><code>{escape(words)}</code></td><td>{escape(refused.why)}</td></tr>"
    if count > _MOST_REFUSED:
        yield f"<tr><td>and {count - _MOST_REFUSED} more</td><td></td></tr>"
    yield "</tbody></table></details>"


def _legend(search: SearchReport) -> str:
    known = '<li><span class="swatch was"></span>default&rsquo;s value</li>' if search.default is not None else ""
    return (
        '<ul class="legend"><li><span class="swatch fast"></span>faster than the default</li>'
        '<li><span class="swatch slow"></span>slower</li>'
        f'<li><span class="swatch won"></span>chosen</li>{known}</ul>'
    )


def _marks(search: SearchReport, values: dict[str, Any]) -> str:
    def has(config: ConfigValues | None) -> bool:
        return config is not None and all(config.get(name) == value for name, value in values.items())

    return " won" * has(search.best.config) + " was" * has(search.default)


def _farthest(search: SearchReport) -> float:
    """The largest distance from the default's speed; a search whose configs are all alike is not coloured as if they differed."""
    return max(0.1, *(abs(math.log(tried.speed)) for tried in search.tried))


def _colour(speed: float, farthest: float) -> str:
    share = min(abs(math.log(speed)) / farthest, 1.0)
    alpha = _FAINTEST + (_STRONGEST - _FAINTEST) * math.sqrt(share)
    if abs(math.log(speed)) < 0.005:
        return "background:rgba(127,140,140,.16)"
    return f"background:rgba(var(--{'fast' if speed > 1 else 'slow'}),{alpha:.2f})"


def _shape(text: str) -> str:
    """A shape that may be wrapped after its commas."""
    return escape(text).replace(",", ",<wbr>")


def _words(config: ConfigValues) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in config.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
