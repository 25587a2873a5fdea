"""The HTML report: what it says, that nothing in it can run or load anything, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from adasplash_cli.main import cli
from adasplash_core.device import DeviceInfo
from adasplash_tuner.report.data import ReportData, from_reports, from_store
from adasplash_tuner.report.page import TIMES, render
from adasplash_tuner.search.events import Finished, Report
from adasplash_tuner.search.search import InputTimes, Outcome
from adasplash_tuner.storage.records import BestConfig, Measurement
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, record

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
MADE = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DEFAULT = {"block_n": 64, "iterations": 8, "path": "lists"}
WINNER = {"block_n": 128, "iterations": 6, "path": "lists"}


def measured(block_n: int, iterations: int, ms: float | None, stage: str = "screening", note: str = "") -> Measurement:
    status = "ok" if ms is not None else "failed"
    config = {"block_n": block_n, "iterations": iterations, "path": "lists"}
    return Measurement(
        config, "s", "i", stage, status, 1, "0.1.0", median_ms=ms, spread_ms=0.01, samples=1, error=1e-3, note=note
    )


MEASURED = (
    measured(64, 8, 1.5, "final"),
    measured(128, 8, 1.1),
    measured(128, 6, 1.0, "final"),
    measured(256, 8, 1.9),
    measured(256, 6, 1.6),
    measured(512, 8, None, note="kernel needs 300000 bytes of shared memory"),
)


def outcome(best: BestConfig | None = None) -> Outcome:
    return Outcome(
        best=best or record(config=WINNER, median_ms=1.0, default_ms=1.5),
        verdict="tuned",
        default=dict(DEFAULT),
        candidates=9,
        measured=6,
        left=3,
        error_bound=1.5e-2,
        gain_interval=(1.46, 1.53),
        by_input=(InputTimes("dense", 3.0, 2.2), InputTimes("sparse", 0.8, 0.5)),
        measurements=MEASURED,
    )


def data(*outcomes: Outcome, device: DeviceInfo = H100) -> ReportData:
    finished = [Finished(n, f"search {n}", found) for n, found in enumerate(outcomes)]
    finished.append(Finished(9, "B=1,H=2,L=64,D=8 fake backward", None, postponed=True))
    return from_reports([Report(device, "tuned.db", finished, passed_over=("B=1,H=2,L=64,D=7: head dim 7 is not supported",))])


def plain(words: str) -> str:
    return " ".join(words.split()).replace(TIMES, "x")


class Page(HTMLParser):
    """The page's words, its tags, and the attributes that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.cells: list[tuple[str, str]] = []  # (class, words)
        self._class = ""
        self.feed(text)
        self.text = plain(" ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "class":
                self._class = value or ""
                if "cell" in self._class.split():
                    self.cells.append((self._class, ""))

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.cells and not self.cells[-1][1].strip().endswith(TIMES):
            kind, said = self.cells[-1]
            self.cells[-1] = (kind, said + data + " ")


def test_a_report_says_what_was_chosen_how_sure_that_is_and_what_was_left_out() -> None:
    page = Page(render(data(outcome()), MADE))
    for words in (
        "1.50x the default", "NVIDIA H100 80GB HBM3", "1.46 to 1.53x", "1.0e-03 of 1.5e-02", "5 of 9", "2026-03-01 12:00 UTC",
        "3 → 2.2 ms, 1.36x", "0.8 → 0.5 ms, 1.60x", "kernel needs 300000 bytes of shared memory",
        "B=1,H=2,L=64,D=8 fake backward: left to the next run", "head dim 7 is not supported",
    ):  # fmt: skip
        assert words in page.text


def test_the_heat_map_marks_winner_and_default_and_shows_each_values_best() -> None:
    page = Page(render(data(outcome()), MADE))
    cells = {plain(words): set(kind.split()) - {"cell"} for kind, words in page.cells}
    assert cells == {
        "64 1.00x": {"was"},
        "128 1.50x": {"won"},
        "256 0.94x": set(),
        "6 1.50x": {"won"},
        "8 1.36x": {"was"},
    }
    assert "path" not in [
        word.strip() for word in page.words[: page.words.index("The chosen config")]
    ]  # one value: nothing to see


def test_where_the_default_won_the_page_says_so() -> None:
    found = replace(outcome(record(config=DEFAULT, median_ms=1.5, default_ms=1.5)), verdict="default", gain_interval=(1.0, 1.0))
    page = Page(render(data(found), MADE))
    assert "the default is the best" in page.text
    assert "the default, chosen" in page.text


def test_an_empty_report_says_how_to_fill_it() -> None:
    assert "adasplash tune --gpu-auto" in Page(render(ReportData(()), MADE)).text


def test_nothing_is_loaded_and_nothing_runs() -> None:
    text = render(data(outcome()), MADE)
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "img", "base"} & set(page.tags)
    assert page.handlers == []
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'" in text


def test_what_a_stranger_wrote_into_a_row_stays_text() -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    best = record(
        config={"block_n": 128, hostile: hostile}, shape=hostile, inputs=hostile, median_ms=1.0, default_ms=1.5, version=hostile
    )
    told = (
        replace(MEASURED[0], config={"block_n": 64, hostile: "x"}),
        replace(MEASURED[2], config=best.config),
        replace(MEASURED[5], note=hostile),
    )
    found = replace(outcome(best), measurements=told, by_input=(InputTimes(hostile, 1.0, 1.0),))
    page = Page(render(data(found, device=replace(H100, name=hostile)), MADE))
    assert not {"script", "img"} & set(page.tags)
    assert page.handlers == []
    assert "<script>alert(1)</script>" in page.text


def test_a_database_gives_the_same_page_but_for_what_it_does_not_keep(store: TuningStore) -> None:
    best = record(config=WINNER, median_ms=1.0, default_ms=1.5, shape="s", inputs="i")
    store.publish(best)
    for m in MEASURED:
        store.add_measurement(best.key, m)
    (search,) = from_store(store).searches
    assert search.default == DEFAULT  # found again by its time in the final
    assert [t.speed for t in search.tried] == pytest.approx([1.5, 1.5 / 1.1, 1.0, 1.5 / 1.6, 1.5 / 1.9])
    assert [r.why for r in search.refused] == ["kernel needs 300000 bytes of shared memory"]
    assert from_store(store, device="h200").searches == ()
    assert from_store(store, backend="torch").searches == ()


def test_a_config_is_compared_to_the_default_of_its_own_stage(store: TuningStore) -> None:
    """The machine was twice as slow in the final: a config that was only screened is no faster for that."""
    told = (
        measured(64, 8, 0.75),
        measured(128, 6, 0.5),
        measured(256, 8, 0.6),
        measured(64, 8, 1.5, "final"),
        measured(128, 6, 1.0, "final"),
    )
    (search,) = data(replace(outcome(), measurements=told)).searches
    assert [(t.config["block_n"], t.speed, t.stage) for t in search.tried] == [
        (128, 1.5, "final"),
        (256, 1.25, "screening"),
        (64, 1.0, "final"),
    ]


def test_a_snapshot_has_winners_and_nothing_else_to_show(
    store: TuningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(record())
    snapshot, page = tmp_path / "snapshot.json", tmp_path / "r.html"
    assert CliRunner().invoke(cli, ["cache", "export", str(snapshot)]).exit_code == 0
    monkeypatch.setenv("ADASPLASH_DB", str(snapshot))
    done = CliRunner().invoke(cli, ["cache", "report", str(page)])
    assert done.exit_code == 0, done.output
    text = Page(page.read_text()).text
    assert "1.50x the default" in text
    assert "What each parameter does" not in text


def test_cache_report_writes_the_database_as_a_page(store: TuningStore, tmp_path: Path) -> None:
    store.publish(record())
    file = tmp_path / "r.html"
    done = CliRunner().invoke(cli, ["cache", "report", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["searches"] == 1
    assert "1.50x the default" in Page(file.read_text()).text
    assert CliRunner().invoke(cli, ["cache", "report", "-"]).stdout.startswith("<!DOCTYPE html>")
    missing = CliRunner().invoke(cli, ["cache", "report", str(tmp_path / "no" / "r.html")])
    assert missing.exit_code == 2
    assert "there is no folder" in missing.stderr


# -- in a browser -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(data(outcome(), outcome(record(config=DEFAULT, median_ms=1.5, default_ms=1.5))), MADE))
    return file


def browse(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0"]
    done = subprocess.run([CHROMIUM, *fixed, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_browser_draws_it_without_a_word_in_the_console(page_file: Path, tmp_path: Path, width: int, dark: bool) -> None:
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = browse(*scheme, f"--window-size={width},1200", f"--screenshot={picture}", page_file.as_uri())
    assert "CONSOLE" not in done.stderr
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (width, 1200)
    assert len(content) > 30_000  # a blank page takes a tenth


@needs_browser
def test_a_browser_refuses_a_script_that_gets_in_all_the_same_and_says_so(page_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.html"
    copy.write_text(page_file.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    done = browse("--dump-dom", copy.as_uri())
    assert "CONSOLE" in done.stderr
    assert "Content Security Policy" in done.stderr
    assert "<title>ran" not in done.stdout


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1100])
def test_no_part_of_the_page_is_wider_than_the_screen(page_file: Path, tmp_path: Path, width: int) -> None:
    """Measured by a script in a copy of the page: in the page itself none may run."""
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth,"
        " [...document.querySelectorAll('.plot text')].every(t => t.getBoundingClientRect().right <= innerWidth)].join()</script>"
    )
    copy = tmp_path / "copy.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page_file.read_text()).replace("</body>", f"{probe}</body>")
    # A window of Chromium is at least 500 wide: the phone is a frame in it.
    inner = tmp_path / "inner.html"
    inner.write_text(text)
    copy.write_text(
        f'<iframe src="inner.html" style="width:{width}px;height:2000px;border:0"></iframe>'
        "<script>onload = () => document.title = frames[0].document.title</script>"
    )
    dom = browse("--allow-file-access-from-files", "--window-size=1300,900", "--dump-dom", copy.as_uri()).stdout
    found = re.search(r"<title>(\d+),(\w+)</title>", dom)
    assert found is not None, dom[:500]
    assert int(found[1]) <= width
    assert found[2] == "true"


@needs_browser
def test_it_can_be_printed(page_file: Path, tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browse(f"--print-to-pdf={paper}", "--no-pdf-header-footer", page_file.as_uri())
    assert paper.read_bytes().startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type /Page\b", paper.read_bytes())) <= 6
