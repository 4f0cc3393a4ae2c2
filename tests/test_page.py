"""The page of a server, in headless Chromium where it is installed."""

import re
import shutil
import sys

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn")

from test_serve import (  # noqa: E402
    PNG,
    PROMPT,
    FakeGenerator,
    film,
    png,
    serving,
    until,
)

from jvdit.serving.preview import webp  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or sys.platform != "linux", reason="needs chromium"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with play.chromium.launch(**options) as found:
            yield found


@pytest.fixture
def visit(browser):
    """Opens the page; whatever a browser complains about is an error."""
    contexts, said = [], []

    def note(message):
        mistake = message.type in ("error", "warning")
        if mistake and not message.text.startswith("Failed to load resource"):
            said.append(message.text)

    def open_page(port, path="/", **options):
        context = browser.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", note)
        foreign = re.compile(rf"^(?!(http://127\.0\.0\.1:{port}/|blob:|data:))")
        page.route(foreign, lambda route: said.append(route.request.url))
        page.goto(f"http://127.0.0.1:{port}{path}")
        page.wait_for_selector(".zone")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    generator = FakeGenerator()
    generator.gate.set()
    with serving(tmp_path_factory.mktemp("page"), generator) as found:
        found.generator = generator
        yield found


def test_a_clip_is_made_without_a_mouse(server, visit):
    server.generator.gate.clear()
    page = visit(server.port)
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    card = page.locator(".card").first
    card.locator("progress").wait_for()
    page.locator("#health", has_text="1 in work").wait_for()
    server.jobs.previews[server.jobs.all()[-1].id] = webp([np.zeros((8, 8, 3), "u1")])
    card.locator(".emerging").wait_for()
    server.generator.gate.set()
    card.locator("video").wait_for()
    until(lambda: page.evaluate("document.querySelector('.card video').readyState") > 1)
    card.locator("[data-do=command]").press("Enter")
    until(lambda: "jvdit.sample" in page.evaluate("navigator.clipboard.readText()"))
    card.locator("[data-do=python]").press("Enter")
    until(lambda: "Generator.load" in page.evaluate("navigator.clipboard.readText()"))
    card.locator("[data-do=link]").press("Enter")
    until(lambda: "/#video_" in page.evaluate("navigator.clipboard.readText()"))
    link = page.evaluate("navigator.clipboard.readText()")
    other = visit(server.port, link.partition(str(server.port))[2])
    other.locator(".card.shown").wait_for()
    card.locator("[data-do=remove]").press("Enter")
    until(lambda: not server.jobs.all())
    until(lambda: page.locator(".card").count() == 0)


def test_what_is_wrong_is_told(server, visit):
    page = visit(server.port)
    page.fill("#prompt", PROMPT)
    page.fill("[name=num_frames]", "999")
    with page.expect_response("**/v1/videos") as answer:
        page.click("#make")
    assert answer.value.status == 400
    page.locator("#told", has_text="tokens").wait_for()


def test_a_clip_becomes_a_first_frame(server, visit, tmp_path):
    page = visit(server.port)
    page.fill("#prompt", PROMPT)
    (tmp_path / "red.png").write_bytes(png())
    page.set_input_files(".zone[data-name=image] input", tmp_path / "red.png")
    page.locator(".zone[data-name=image] img").wait_for()
    page.click("#make")
    page.locator(".card video").first.wait_for()
    assert server.jobs.all()[-1].told["settings"]["conditions"] == ["image"]
    page.click(".zone[data-name=image] button")
    assert page.locator(".zone[data-name=image] img").is_hidden()
    page.locator(".card").first.drag_to(
        page.locator(".zone[data-name=image]"), source_position={"x": 60, "y": 60}
    )
    page.locator(".zone[data-name=image] img").wait_for()
    page.click("[data-do=reuse]")
    assert page.input_value("[name=seed]") != ""


def test_keyframes_have_their_times_and_footage_its_strength(server, visit, tmp_path):
    """Zones come with each further picture, and go; a drop becomes what it is on."""
    page = visit(server.port)
    page.fill("#prompt", PROMPT)
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "film.mp4").write_bytes(film())
    frames = page.locator(".zone[data-name=keyframes]")
    for i, seconds in enumerate(("", "1")):
        frames.nth(i).locator("[type=file]").set_input_files(tmp_path / "red.png")
        if seconds:
            frames.nth(i).locator(".number input").fill(seconds)
    assert frames.count() == 3 and frames.nth(2).locator(".number").is_hidden()
    data = page.evaluate_handle(
        """(text) => {
          const bytes = Uint8Array.from(atob(text), (x) => x.charCodeAt());
          const data = new DataTransfer();
          data.items.add(new File([bytes], "drawn.png", { type: "image/png" }));
          return data;
        }""",
        PNG.partition(",")[2],
    )
    last = page.locator(".zone[data-name=last_image]")
    last.dispatch_event("drop", {"dataTransfer": data})
    last.locator("img").wait_for()
    page.click("#make")
    until(lambda: server.jobs.all() and server.jobs.all()[-1].asked.keyframes)
    asked = server.jobs.all()[-1]
    assert asked.asked.keyframes == (0.5, 1.0)
    assert asked.told["settings"]["conditions"] == ["last_image", "keyframes"]
    for _ in range(2):
        frames.first.locator("button").click()
    assert frames.count() == 1
    last.locator("button").click()
    page.click("#more-zones summary")
    film_zone = page.locator(".zone[data-name=restyle]")
    film_zone.locator("[type=file]").set_input_files(tmp_path / "film.mp4")
    film_zone.locator(".number input").fill("0.25")
    page.click("#make")
    until(lambda: server.jobs.all()[-1].asked.strength == 0.25)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off_and_all_can_be_read(server, visit, scheme, width, tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    size = {"width": width, "height": 800}
    page = visit(server.port, color_scheme=scheme, viewport=size)
    for summary in page.locator("summary").all():
        summary.click()
    page.set_input_files(".zone[data-name=keyframes] [type=file]", tmp_path / "red.png")
    page.locator(".zone[data-name=keyframes] .number").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(x => "
        "x.offsetParent && !(x.innerText || x.labels?.length || x.ariaLabel)).length"
    )
    assert unnamed == 0
    for place in ("body", "label", "#make", "#model", "summary"):
        assert contrast(page, place) >= 4.5, place


def contrast(page, place):
    """The contrast of a text to what lies under it (WCAG 2.2, 1.4.3)."""
    colours = page.evaluate(
        """place => {
          let at = document.querySelector(place);
          const ink = getComputedStyle(at).color;
          while (getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)')
            at = at.parentElement;
          return [ink, getComputedStyle(at).backgroundColor];
        }""",
        place,
    )

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        lights = [
            x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        ]
        return 0.2126 * lights[0] + 0.7152 * lights[1] + 0.0722 * lights[2]

    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_token_is_asked_for_once(tmp_path, server, browser):
    with serving(tmp_path, server.generator, token="secret") as guarded:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{guarded.port}/")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.fill("#prompt", PROMPT)
        page.click("#make")
        page.locator(".card video").wait_for()
        assert page.get_attribute(".card video", "src").startswith("blob:")
        context.close()
