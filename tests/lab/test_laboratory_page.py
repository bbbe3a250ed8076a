"""The page of a layout in a real browser: mouse, keyboard, light and dark, wide and narrow."""

import re
from collections.abc import Iterator

import pytest
import torch

import cute_quant
from cute_quant import NAMED_FORMATS, Format
from cute_quant.kernels.config import LANES
from cute_quant.lab import Layout, assignment, draw, make_layout, pictures
from cute_quant.lab.drawing import Box
from cute_quant.lab.page import CHOICES
from tests.lab.browser import CHROMIUM, Page, browser

VIEWS = {
    "wide": (1400, 1200, "light"),
    "wide, dark": (1400, 1200, "dark"),
    "half": (800, 1000, "light"),
    "half, dark": (800, 1000, "dark"),
    "narrow": (400, 800, "light"),
    "narrow, dark": (400, 800, "dark"),
}
PAGES = {
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
    paths = {name: folder / f"{i}.html" for i, name in enumerate(PAGES)}
    for name, path in paths.items():
        draw(make_layout(**PAGES[name]), path)
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


def dimmed(page: Page) -> bool:
    return page.evaluate("document.querySelectorAll('.chosen').length") > 0


def choose(page: Page, **choices: object) -> None:
    for name, value in choices.items():
        page.evaluate(
            f"(() => {{ const n = document.getElementById({name!r}); n.value = {str(value)!r};"
            "n.dispatchEvent(new Event('change')) })()"
        )


def drawn(page: Page, kind: str) -> list[list[str]]:
    """Return the classes and data of the boxes of a kind, as a reader sees them."""
    return page.evaluate(
        f"[...document.querySelectorAll('[data-{kind}]')].map(n => "
        "[n.getAttribute('class').replace(/ (lit|mate)/g, ''),"
        "...Object.entries(n.dataset).map(e => e.join('='))])"
    )


def expected_boxes(layout: Layout, kind: str, *shape: int) -> list[list[str]]:
    """Return the same of the boxes of the drawings in Python."""
    return [
        [
            " ".join(filter(None, (f"f-{p.fill}", p.stroke and f"s-{p.stroke}"))),
            *(f"{name}={value}" for name, value in p.data.items()),
        ]
        for drawing in pictures.pictures(layout, *shape)
        for p in drawing.parts
        if isinstance(p, Box) and kind in p.data
    ]


def test_the_panel_shows_the_first_element_before_anything_is_pointed_at(page):
    assert details(page)["element"] == "row 0, column 0: value 0 of 16, byte 0 of the row"
    assert lit(page, "t") == ["0"] and not dimmed(page)


CHOSEN = [
    {},
    {"rows_per_thread": 4},
    {"values_per_thread": 4, "row_warps": 1},
    {"values_per_thread": 32, "column_warps": 2},
    {"values_per_thread": 64, "row_warps": 2},
    {"values_per_thread": 128, "row_warps": 1},
    {"row_warps": 2, "column_warps": 2, "rows_per_thread": 2},
    {"row_warps": 8, "values_per_thread": 8, "rows_per_thread": 2},
    {"format": "DEEP_GEMM_32", "values_per_thread": 8},
    {"format": "DEEP_GEMM_SM90", "rows_per_thread": 2, "column_warps": 2},
    {"format": "MXFP8", "row_warps": 2},
    {"format": "GROUPWISE_FP8", "values_per_thread": 32},
    {"format": "INT8", "column_warps": 4, "row_warps": 1},
    {"format": "NVFP4", "row_warps": 1},
    {"format": "NVFP4", "values_per_thread": 8, "rows_per_thread": 4, "row_warps": 1},
    {"format": "MXFP4", "values_per_thread": 32, "rows_per_thread": 2, "row_warps": 1},
]


@pytest.mark.parametrize("choices", CHOSEN, ids=str)
def test_a_layout_chosen_in_the_page_is_drawn_as_in_python(page, choices):
    choose(page, **choices)
    numbers = {name: value for name, value in choices.items() if name != "format"}
    layout = make_layout(NAMED_FORMATS[choices.get("format", "DEEP_GEMM")], **numbers)
    assert page.evaluate("document.getElementById('refusal').textContent") == ""
    summary = page.evaluate("document.getElementById('summary').textContent")
    assert summary == pictures.summary(layout)
    for kind in ("t", "scale", "l"):
        expected = expected_boxes(layout, kind)
        found = drawn(page, kind)
        if kind == "l":  # Narrow boxes have no frame, and how narrow is the page's to say.
            expected, found = ([b[1:] for b in boxes] for boxes in (expected, found))
        assert sorted(found) == sorted(expected) and expected
    threads = assignment.threads(layout)
    mn, k = pictures.example_rows(layout), pictures.example_columns(layout)
    scales = {(s.row, s.group): s for s in assignment.scales(layout, mn, k)}
    for t in (threads[0], threads[37 % len(threads)], threads[-1]):
        page.evaluate(f"show({{thread: {t.number}}})")
        found = details(page)
        assert found["thread"] == f"{t.number}: warp {t.warp}, lane {t.lane}"
        assert found["holds"] == "; ".join(
            f"row {s.row}, columns {s.column} … {s.column + s.values - 1}" for s in t.segments
        )
        partners = ", ".join(str(n % LANES) for n in t.partners)
        assert found["shuffles"] == (f"with lanes {partners}" if partners else "with none")
        (writer,) = (w.number for w in threads if t.groups[0] in w.writes)
        assert f"byte {scales[t.groups[0]].offset} of sf" in found["scale"]
        assert found["scale"].endswith(f"; stored by thread {writer}")


def test_every_choice_is_valid_where_it_is_in_python(page):
    """The page has a layout for the choices that `make_layout` takes, and else its words."""
    tiles, strings = page.evaluate("data.tiles"), page.evaluate("data.strings")
    refused = 0
    for key, entry in tiles.items():
        name, *numbers = key.split(",")
        try:
            make_layout(NAMED_FORMATS[name], **dict(zip(CHOICES, map(int, numbers), strict=True)))
        except ValueError as error:
            assert strings[entry] == str(error)
            refused += 1
        else:
            assert isinstance(entry, list)
    assert 0 < refused < len(tiles)


def test_lanes_and_values_are_one_choice(page):
    choose(page, lanes=4)
    assert page.evaluate("document.getElementById('values_per_thread').value") == "32"
    choose(page, format="MXFP8")
    assert page.evaluate("document.getElementById('lanes').value") == "1"
    choose(page, values_per_thread=8)
    assert page.evaluate("document.getElementById('lanes').value") == "4"


def test_a_refused_choice_says_why_and_leaves_the_pictures(page):
    choose(page, lanes=1)
    before = drawn(page, "t")
    options = "[...document.getElementById('rows_per_thread').options].map(o => o.text)"
    assert page.evaluate(options) == ["1", "2", "4 (refused)", "8 (refused)"]
    choose(page, rows_per_thread=4)
    refusal = page.evaluate("document.getElementById('refusal').textContent")
    assert refusal.startswith(
        "Refused: values_per_thread, rows_per_thread, tiles_per_thread: expected at most 512 bytes"
    )
    assert drawn(page, "t") == before
    choose(page, rows_per_thread=1)
    assert page.evaluate("document.getElementById('refusal').textContent") == ""


def test_a_page_starts_with_its_own_layout(chromium, files):
    path = files["default"].with_name("own.html")
    layout = make_layout(
        Format.parse("e4m3:64:float32:mn_major"),
        torch.float32,
        row_warps=3,
        warp_order="along",
        load_bytes=8,
    )
    draw(layout, path, 6, 512)
    chromium.view(*VIEWS["wide"])
    chromium.open(path)
    for kind in ("t", "scale"):
        assert sorted(drawn(chromium, kind)) == sorted(expected_boxes(layout, kind, 6, 512))
    assert chromium.evaluate("document.getElementById('row_warps').value") == "3"
    call = chromium.evaluate("document.querySelector('#layouts dd:last-of-type').textContent")
    names = {"cq": cute_quant, "torch": torch, "make_layout": make_layout}
    assert eval(call, names) == layout
    assert chromium.errors == []


def test_nothing_but_the_file_is_asked_for(page, files):
    folder = files["default"].parent.as_uri()
    assert all(url.startswith((folder, "about:blank")) for url in page.requests)
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
    assert found["scale"] == "group 1: byte 1 of word 0, byte 5 of sf; stored by thread 40"


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
        "stored by": "thread 88: warp 2, lane 24",
    }
    page.point('[data-scale="7,0"]')
    assert details(page)["scale"].endswith("byte 28 of sf; padding, 0")


def test_values_of_four_bits(page):
    choose(page, format="MXFP4", row_warps=1)
    for column, where in (
        (34, "byte 17 of the row, its low"),
        (35, "byte 17 of the row, its high"),
    ):
        page.evaluate(f"show({{thread: 2, row: 0, column: {column}}})")
        assert details(page)["in q"] == f"{where} four bits"
    left = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-nibble]')]"
        ".map(n => [n.dataset.nibble, n.getBoundingClientRect().x]))"
    )
    order = sorted(map(int, left), key=lambda column: left[str(column)])
    assert order == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14]
    choose(page, format="MXFP8")
    assert page.evaluate("document.querySelectorAll('[data-nibble]').length") == 0
    assert "in q" not in details(page)


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
    assert lit(page, "t") == ["0"] and not dimmed(page)
    page.point('[data-t="90"]')
    assert lit(page, "t") == ["90"]


def test_the_keyboard_alone(page):
    for _ in range(20):
        page.press("Tab")
        if page.evaluate("document.activeElement.id") == "tile":
            break
    else:
        pytest.fail("the first picture cannot be reached")
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
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


def test_choices_by_the_keyboard(page):
    page.evaluate("document.getElementById('rows_per_thread').focus()")
    page.press("ArrowDown")
    assert "of each of 2 rows" in page.evaluate("document.getElementById('summary').textContent")


def test_arrow_keys_move_over_scales(page):
    page.evaluate("document.getElementById('scales').focus()")
    for key, scale in (
        ("ArrowRight", "0,0"),
        ("ArrowRight", "0,1"),
        ("ArrowDown", "1,1"),
        ("ArrowLeft", "1,0"),
        ("ArrowLeft", "1,0"),
    ):
        page.press(key)
        assert lit(page, "scale") == [scale]
    assert details(page)["scale"] == "row 1, group 0: byte 0 of word 0, byte 4 of sf"


def test_several_rows_and_packs(chromium, files):
    chromium.view(*VIEWS["wide"])
    chromium.open(files["two rows, two packs"])
    chromium.point('[data-t="64"]')  # warp 2: the first rows, the second pack
    assert details(chromium)["holds"] == "row 0, columns 512 … 527; row 1, columns 512 … 527"
    assert lit(chromium, "scale") == ["0,4", "1,4"]
    assert len(lit(chromium, "t")) == 2
    chromium.point('[data-scale="1,4"]')
    assert details(chromium)["stored by"] == "thread 65: warp 2, lane 1"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("lanes", [8, 32, 1])
def test_fits_and_is_legible(chromium, files, view, lanes):
    chromium.view(*VIEWS[view])
    chromium.open(files["default"])
    choose(chromium, row_warps=1, lanes=lanes)
    width = VIEWS[view][0]
    assert chromium.evaluate("document.documentElement.scrollWidth") == width, "no scrolling"
    cut = chromium.evaluate(
        "[...document.querySelectorAll('svg, svg *, select, input, button, code, dd')]"
        ".filter(n => { const b = n.getBoundingClientRect(); return b.left < 0 ||"
        "b.right > innerWidth }).map(n => n.outerHTML)"
    )
    assert cut == [], "nothing is cut at the edges"
    sizes = chromium.evaluate(
        "[...document.querySelectorAll('svg text')].map(n => +n.getAttribute('font-size')"
        "* n.ownerSVGElement.getBoundingClientRect().width"
        "/ n.ownerSVGElement.viewBox.baseVal.width)"
    )
    assert min(sizes) >= 9
    narrowest = chromium.evaluate(
        "Math.min(...[...document.querySelectorAll('[data-t]')]"
        ".map(n => n.getBoundingClientRect().width))"
    )
    assert narrowest >= 18, "a box has room for its lane"
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
