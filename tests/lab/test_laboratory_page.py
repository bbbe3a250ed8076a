"""The page of a layout in a real browser: mouse, keyboard, light and dark, wide and narrow."""

import re
from collections.abc import Iterator

import pytest

from cute_quant.lab import draw, make_layout
from tests.lab.browser import CHROMIUM, Page, browser

VIEWS = {
    "wide": (1400, 1200, "light"),
    "wide, dark": (1400, 1200, "dark"),
    "narrow": (400, 800, "light"),
    "narrow, dark": (400, 800, "dark"),
}
CHOICES = {
    "default": {},
    "two rows, two packs": {"rows_per_thread": 2, "column_warps": 2, "row_warps": 2},
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{i}.html" for i, name in enumerate(CHOICES)}
    for name, path in paths.items():
        draw(make_layout(**CHOICES[name]), path)
    return paths


@pytest.fixture
def page(chromium, files) -> Iterator[Page]:
    chromium.view(*VIEWS["wide"])
    chromium.open(files["default"])
    yield chromium
    assert chromium.errors == []


def details(page: Page) -> dict[str, str]:
    text = page.evaluate("[...document.querySelectorAll('#details > *')].map(n => n.textContent)")
    return dict(zip(text[::2], text[1::2], strict=True))


def lit(page: Page, kind: str, name: str = "lit") -> list[str]:
    return page.evaluate(
        f"[...document.querySelectorAll('[data-{kind}].{name}')].map(n => n.dataset.{kind})"
    )


def test_nothing_but_the_file_is_asked_for(page, files):
    assert set(page.requests) <= {path.as_uri() for path in files.values()} | {"about:blank"}
    links = re.findall(r"https?://[^\s\"']+", files["default"].read_text())
    assert set(links) == {"http://www.w3.org/2000/svg"}


def test_a_thread_lights_its_elements_its_scale_and_its_addresses(page):
    page.point('[data-t="42"]')  # warp 1, lane 10
    assert lit(page, "t") == ["42"]
    assert sorted(map(int, lit(page, "t", "mate"))) == [40, 43, 46]
    assert lit(page, "scale") == ["1,1"]
    assert set(lit(page, "l")) == {"10"}
    # Two strips of loads on Hopper, one on Blackwell, one of stores.
    assert len(lit(page, "l")) == 4
    found = details(page)
    assert found["thread"] == "42: warp 1, lane 10"
    assert found["holds"] == "row 1, columns 160 … 175"
    assert found["loads"].startswith("bytes 320 … 351 of each row: 2 \u00d7 16 bytes on sm_90a")
    assert found["shuffles"] == "with lanes 11, 8, 14"
    assert found["scale"] == "group 1: byte 1 of word 0, byte 5 of sf; thread 40 writes it"


@pytest.mark.parametrize("value", [0, 7, 15])
def test_an_element_shows_its_thread(page, value):
    page.point('[data-t="42"]', (value + 0.5) / 16)
    column = 160 + value
    expected = f"row 1, column {column}: value {value} of 16, byte {2 * column} of the row"
    assert details(page)["element"] == expected
    element, box = page.evaluate(
        "[...document.querySelectorAll('.element, [data-t=\"42\"]')].reverse()"
        ".map(n => n.getBoundingClientRect().x)"
    )
    width = page.evaluate("document.querySelector('.element').getBoundingClientRect().width")
    assert element == pytest.approx(box + value * width, abs=0.5)


def test_a_scale_shows_its_group(page):
    page.point('[data-scale="2,3"]')
    assert lit(page, "t") == ["88"]
    assert sorted(map(int, lit(page, "t", "mate"))) == list(range(89, 96))
    assert details(page) == {
        "scale": "row 2, group 3: byte 3 of word 0, byte 11 of sf",
        "group": "threads 88 … 95",
        "written by": "thread 88: warp 2, lane 24",
    }
    page.point('[data-scale="7,0"]')
    assert details(page)["scale"].endswith("byte 28 of sf; padding, 0")


def test_an_address_shows_its_thread(page):
    page.point('[data-l="5"]')
    assert details(page)["thread"] == "5: warp 0, lane 5"


def test_pointing_moves_nothing(page):
    place = "document.querySelector('[data-t=\"42\"]').getBoundingClientRect().y"
    page.point('[data-t="42"]')
    before = page.evaluate(place)
    for number in (43, 100, 42):
        page.point(f'[data-t="{number}"]')
    page.evaluate("document.getElementById('clear').click()")
    page.point('[data-t="42"]')
    assert page.evaluate(place) == before


def test_a_click_stays_until_escape(page):
    page.click('[data-t="7"]')
    page.point('[data-t="90"]')
    assert lit(page, "t") == ["7"]
    page.press("Escape")
    assert (
        lit(page, "t") == [] and page.evaluate("document.querySelectorAll('.chosen').length") == 0
    )
    page.point('[data-t="90"]')
    assert lit(page, "t") == ["90"]


def test_the_keyboard_alone(page):
    for _ in range(20):
        page.press("Tab")
        if page.evaluate("document.activeElement.id") == "tile":
            break
    else:
        pytest.fail("the first picture cannot be reached")
    for key, thread in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowDown", 33), ("ArrowLeft", 32)):
        page.press(key)
        assert lit(page, "t") == [str(thread)]
    page.press("ArrowRight", shift=True)
    assert details(page)["element"].startswith("row 1, column 1: value 1 of 16")
    page.evaluate("document.getElementById('thread').select()")
    page.evaluate("document.getElementById('thread').focus()")
    page.type("99")
    assert lit(page, "t") == ["99"]
    for name, text in (("row", "2"), ("column", "300")):
        page.evaluate(f"document.getElementById({name!r}).select()")
        page.type(text)
    assert details(page)["thread"] == "82: warp 2, lane 18"


def test_several_rows_and_packs(chromium, files):
    chromium.view(*VIEWS["wide"])
    chromium.open(files["two rows, two packs"])
    chromium.point('[data-t="64"]')  # warp 2: the first rows, the second pack
    assert details(chromium)["holds"] == "row 0, columns 512 … 527; row 1, columns 512 … 527"
    assert lit(chromium, "scale") == ["0,4", "1,4"]
    assert len(lit(chromium, "t")) == 2
    chromium.point('[data-scale="1,4"]')
    assert details(chromium)["written by"] == "thread 65: warp 2, lane 1"


@pytest.mark.parametrize("view", VIEWS)
def test_fits_and_is_legible(chromium, files, view):
    chromium.view(*VIEWS[view])
    chromium.open(files["default"])
    width = chromium.evaluate("document.documentElement.scrollWidth")
    assert width == VIEWS[view][0], "the page itself does not scroll sideways"
    size = chromium.evaluate(
        "Math.min(...[...document.querySelectorAll('#tile text')]"
        ".map(n => n.getBoundingClientRect().height))"
    )
    assert size >= 8
    colours = chromium.evaluate(
        "['--ink', '--muted', '--paper', '--a0', '--b0', '--a1', '--b1', '--a2', '--b2', '--a3',"
        "'--b3'].map(n => getComputedStyle(document.documentElement).getPropertyValue(n))"
    )
    ink, muted, paper, *fills = map(luminance, colours)
    assert contrast(muted, paper) > 4.5
    assert min(contrast(ink, fill) for fill in (paper, *fills)) > 4.5
    assert (paper < 0.5) == ("dark" in view)
    chromium.click('[data-t="3"]')
    visible = chromium.evaluate(
        "(() => { const b = document.querySelector('#details').getBoundingClientRect();"
        "return b.top < innerHeight && b.bottom > 0 })()"
    )
    assert visible, "what was found is in sight"


def luminance(colour: str) -> float:
    channels = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
