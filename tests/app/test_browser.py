"""The page of `evovit app` in a real browser: upload, sliders, wrong files, two visitors, phone, dark mode.

Needs gradio, playwright and a Chromium (apt-get install chromium). Where one is missing the tests are skipped
and say so; in CI they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import evovit
from evovit.checkpoints.reduced import save_reduced
from evovit.engines.base import LogitsAlone, Plan, on_cpu, trace
from evovit.engines.exporting import preprocessing_of
from evovit.engines.pt2 import Pt2
from evovit.look import open_named
from evovit.tuning.latency import LatencyTable
from evovit.tuning.plans import Plan as SchedulePlan
from evovit.tuning.record import write_tuned
from evovit.tuning.tune import Candidate, Tuned

pytestmark = pytest.mark.browser
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
NASTY = "${7*7} {{value}} <b>cat.png"
WAIT = 60_000  # milliseconds


WATCHED = """
import sys

def hear(event, given):
    if event == "socket.getaddrinfo" and given[0] not in (None, "127.0.0.1", "localhost"):
        print("AWAY", given, file=sys.stderr)
    if event == "socket.connect" and isinstance(given[1], tuple) and not given[1][0].startswith("127."):
        print("AWAY", given, file=sys.stderr)

sys.addaudithook(hear)
from evovit.cli import main
main(sys.argv[1:])
"""


def chromium() -> str:
    """Return the path of the browser, or skip with what is missing."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    missing = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    missing += [] if program else ["Chromium (apt-get install chromium)"]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"missing: {', '.join(missing)}")
    return str(program)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model, an export of it and a search."""
    chromium()
    folder = tmp_path_factory.mktemp("app")
    host = open_named("small_vit").model
    model = evovit.reduce_tokens(host, "evo_vit", start_block=2, keep_ratio=0.5)
    save_reduced(model, folder / "saved" / "mine", host="small_vit")
    write_export(model, folder / "exports" / "mine")
    (folder / "tuned" / "mine").mkdir(parents=True)
    write_tuned(folder / "tuned" / "mine", found_by_hand())
    Image.effect_noise((300, 200), 90).convert("RGB").save(folder / NASTY)
    Image.new("RGB", (50, 400), "teal").save(folder / "tall.tiff")
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    with (folder / "large.png").open("wb") as file:
        file.truncate(101 * 1024 * 1024)
    return folder


def write_export(model: evovit.ReducedViT, folder: Path) -> None:
    """Write a model as `export` does, without the proof, which takes long."""
    folder.mkdir(parents=True)
    plan, ready = Plan(batch=1), on_cpu(model)
    program = trace(LogitsAlone(ready), preprocessing_of(ready)["input_size"], plan)
    Pt2().write(program, folder / "model.pt2", plan)
    entry = {
        "precision": "fp32",
        "method": "evo_vit",
        "options": {"start_block": 2},
        "gmacs": 0.04,
        "batch": 1,
    }
    (folder / "export.json").write_text(json.dumps({"pt2": entry}))
    (folder / "preprocessing.json").write_text(json.dumps(preprocessing_of(model)))


def found_by_hand() -> Tuned:
    """Return what a search might find: two schedules, and a knob that is chosen."""
    plans = [SchedulePlan("evit", {"keep_per_block": (64, *[48 - 8 * i] * 7)}) for i in range(2)]
    plans.append(SchedulePlan("tome", {"r": 4}))
    found = [
        Candidate(plan, 10.0 - i, 12.0, 1.2 + i / 10, 0.02, 0.01 * (i + 1), 0.04, 9.0, 1)
        for i, plan in enumerate(plans)
    ]
    times = dict.fromkeys(("attention", "ffn", "last"), (1.0, 2.0))
    latency = LatencyTable((16, 67), times, times, 8, 12.0, 12.0)
    conditions = {"clock": "by hand", "images": 16, "random_images": True, "measure": "KL divergence"}
    return Tuned(None, found[2], 1.2, True, "tome (r=4): 1.40x", 12.0, found, latency, {}, conditions)


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """The address of the page, served by the command itself, which tells of every other machine it asks."""
    command = [sys.executable, "-u", "-c", WATCHED, "app", "saved/mine", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = place / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=output, text=True
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line + log.read_text()
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    told = log.read_text()
    assert process.returncode == 0 and "Traceback" not in told and "AWAY" not in told


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


# What an element says; of one of ours what stands in it, without the clock that runs while it waits.
TEXT = """where => (document.querySelector(`${where} .html-container`) ?? document.querySelector(where))
    ?.innerText ?? ''"""


class Visitor:
    """Somebody with a browser of their own."""

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.context = browser.new_context(**({"viewport": DESKTOP} | how))
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.fetched: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.until("#answers", "both say|dense says")

    def text(self, where: str) -> str:
        return str(self.page.evaluate(TEXT, where))

    def until(self, where: str, pattern: str) -> str:
        """Wait until an element says something, and return what it says."""
        check = f"([where, pattern]) => new RegExp(pattern).test(({TEXT})(where))"
        self.page.wait_for_function(check, arg=[where, pattern])
        return self.text(where)

    def picture(self) -> str:
        """Return what the large picture shows, in words."""
        return str(self.page.locator("#picture img").get_attribute("alt"))

    def upload(self, path: Path) -> None:
        self.page.locator("#photograph input[type=file]").set_input_files(path)

    def light(self, where: str, what: str) -> bool:
        """Tell whether a colour of an element is a light one."""
        colour = self.page.evaluate(
            "([where, what]) => getComputedStyle(document.querySelector(where))[what]", [where, what]
        )
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3 > 127

    def press(self, slider: str, key: str, times: int = 1) -> None:
        knob = self.page.locator(f"{slider} input[type=range]")
        knob.focus()
        for _ in range(times):
            knob.press(key)

    def choose(self, dropdown: str, text: str) -> None:
        field = self.page.locator(f"{dropdown} input")
        field.fill(text)
        field.press("Enter")


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Open the page as a new visitor; at the end nothing was fetched from elsewhere and no script failed."""
    came: list[Visitor] = []

    def come(**how: Any) -> Visitor:
        came.append(Visitor(browser, address, **how))
        return came[-1]

    yield come
    for visitor in came:
        away = [url for url in visitor.fetched if not url.startswith((address, "data:", "blob:"))]
        assert not away and not visitor.errors
        visitor.context.close()


def test_the_page_shows_china_at_once_and_times_it(visit: Any) -> None:
    visitor = visit()
    assert visitor.page.title() == "evovit" and visitor.picture().startswith("china, what it keeps, block 6")
    assert "Here, dense means the reduced model" in visitor.text("#notes")
    text = visitor.until("#conditions", "rounds in turn")
    assert (
        "other visitors and other programs on this machine disturb it" in text
        and "speed-up" in visitor.text("#cost")
    )


def test_an_upload_a_method_and_both_sliders(visit: Any, place: Path) -> None:
    visitor = visit()
    visitor.upload(place / NASTY)
    visitor.until("#photograph-note", "cat")
    assert visitor.text("#photograph-note").strip() == NASTY
    visitor.page.wait_for_function("document.querySelector('#picture img').alt.includes('cat')")
    assert visitor.picture().startswith(NASTY)
    visitor.choose("#method", "evit")
    visitor.until("#answers", "evit blocks")
    before = visitor.until("#picture", r"block 6\s+\d+ of \d+ patches")
    visitor.press("#ratio", "ArrowLeft", 4)
    after = visitor.until("#answers", "budget=0.3") and visitor.text("#picture")
    kept, less = (int(re.findall(r"(\d+) of \d+ patches", each)[0]) for each in (before, after))
    assert less < kept
    answers = visitor.text("#answers")
    visitor.press("#block", "Home")
    visitor.until("#picture", r"block 0\s+all of")
    visitor.page.get_by_label("what it ranks by").first.check()
    visitor.until("#picture", "ranks nothing here")
    assert visitor.text("#answers") == answers
    visitor.upload(place / "tall.tiff")
    visitor.until("#photograph-note", "tall")
    visitor.page.get_by_label("the photograph").first.check()
    visitor.until("#picture", "50 x 400 pixels")


def test_wrong_files_are_a_sentence_and_what_was_seen_stays(visit: Any, place: Path) -> None:
    visitor = visit()
    before = visitor.picture()
    visitor.upload(place / "text.jpg")
    visitor.until("#photograph-note", "'text.jpg' is not an image that Pillow reads; give a JPEG or PNG")
    visitor.upload(place / "notes.txt")
    visitor.until(".toast-wrap", "Invalid file type: notes.txt")
    visitor.upload(place / "large.png")
    visitor.until(".toast-wrap", "exceed the maximum allowed size")
    assert visitor.picture() == before and "Traceback" not in visitor.text("body")


def test_a_wrong_model_or_option_is_a_sentence(visit: Any) -> None:
    visitor = visit()
    visitor.choose("#model", "deit_smal_patch16_224")
    visitor.until("#picture", "timm does not know. Did you mean 'deit_small_patch16_224'")
    visitor.choose("#model", "small_vit")
    assert "Random weights" in visitor.until("#notes", "small_vit, random weights")
    visitor.page.get_by_text("Options, exported engines").click()
    field = visitor.page.locator("#options textarea, #options input").first
    field.fill("keep=2")
    field.press("Enter")
    visitor.until("#picture", "has no option 'keep'")
    field.fill("start_block=1")
    field.press("Enter")
    visitor.until("#answers", "start_block=1")


def test_two_visitors_at_once_do_not_see_each_other(visit: Any, place: Path) -> None:
    one, other = visit(), visit()
    one.page.locator("#samples button").nth(1).click()
    other.upload(place / NASTY)
    for visitor, title in ((one, "flower"), (other, NASTY)):
        visitor.page.wait_for_function(
            "title => document.querySelector('#picture img').alt.startsWith(title)", arg=title
        )
        visitor.until("#conditions", "rounds in turn")
    one.press("#block", "Home")
    one.until("#picture", "block 0")
    assert one.picture().startswith("flower") and other.picture().startswith(
        f"{NASTY}, what it keeps, block 6"
    )
    third = visit()
    assert third.picture().startswith("china")


def test_an_exported_file_runs_beside(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_text("Options, exported engines").click()
    visitor.choose("#export", "exports/mine")
    visitor.until("#answers", "torch.export fp32")
    visitor.until("#conditions", "rounds in turn")
    assert "torch.export fp32" in visitor.text("#cost")
    visitor.choose("#export", "nowhere")
    visitor.until("#export-note", "There is no 'nowhere/export.json'")


def test_methods_side_by_side(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.until("#compare-conditions", "rounds in turn")
    images = visitor.page.locator("#tiles img")
    assert images.count() == 3 and "china" in images.first.get_attribute("alt")
    visitor.press("#compare-block", "Home")
    visitor.page.wait_for_function("document.querySelector('#tiles img').alt.endsWith('block 0')")
    visitor.page.locator("#samples button").nth(2).click()
    visitor.page.wait_for_function("document.querySelector('#tiles img').alt.startsWith('digit 2')")
    visitor.page.get_by_role("tab", name="Look").click()
    visitor.page.wait_for_function("document.querySelector('#picture img').alt.startsWith('digit 2')")


def test_a_search_is_shown(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_role("tab", name="Tuned").click()
    visitor.until("#found", "Target 1.20x")
    assert visitor.page.locator("#found img").evaluate("image => image.naturalWidth") > 500
    visitor.choose("#search", "nowhere")
    visitor.until("#found", "There is no 'nowhere/tuned.json'")


def test_nothing_is_cut_off_on_desktop_and_phone_in_light_and_dark(visit: Any) -> None:
    visitor = visit()
    visitor.until("#conditions", "rounds in turn")
    for tab, ready in (("Look", "#conditions"), ("Compare", "#compare-conditions"), ("Tuned", "#found")):
        visitor.page.get_by_role("tab", name=tab).click()
        visitor.until(ready, "rounds in turn|Target")
        for viewport, scheme in product((DESKTOP, PHONE), ("light", "dark")):
            visitor.page.set_viewport_size(viewport)
            visitor.page.emulate_media(color_scheme=scheme)
            visitor.page.wait_for_timeout(300)
            wide = visitor.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= viewport["width"] and not visitor.page.evaluate(CUT_OFF), (tab, viewport, scheme)
            for ground, ink in (("body", "#head h1"), (ready, f"{ready} p")):
                assert visitor.light(ink, "color") != (scheme == "light"), (tab, scheme)
                assert ground != "body" or visitor.light("body", "backgroundColor") == (scheme == "light")
        visitor.page.set_viewport_size(DESKTOP)


# Texts and pictures of our own that reach beyond the window or that their box cuts off.
CUT_OFF = """() => [...document.querySelectorAll('.parts *')].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest('.scroll')) return false;
    const hides = getComputedStyle(element).overflow === 'hidden';
    const cut = hides && element.scrollWidth > element.clientWidth + 1;
    return box.left < -1 || box.right > innerWidth + 1 || cut;
}).map(element => element.outerHTML.slice(0, 80))"""


def test_the_server_listens_to_this_machine_alone(address: str) -> None:
    port = int(address.rpartition(":")[2])
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    if not tables[0].is_file():
        pytest.skip("missing: /proc/net/tcp, which tells who listens")
    rows = [row.split() for table in tables if table.is_file() for row in table.read_text().splitlines()[1:]]
    listens = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert listens == {"0100007F"}
