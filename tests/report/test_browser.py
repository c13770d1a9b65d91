"""The page in a real browser: wide and narrow, mouse and keyboard, light and dark, with and without script."""

import pytest

from perjoule.report import page

from . import browser, example

pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = [
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing()),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves its log pipe to the collector
]

WIDTH = "return document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    page.write(example.result(), path)
    return path.as_uri()


@pytest.fixture(scope="module")
def driver():
    with browser.browser() as made:
        yield made


@pytest.fixture
def opened(driver, address):
    browser.size(driver, 1400, 900)
    driver.get(address)
    return driver


def css(driver, selector):
    return driver.find_elements("css selector", selector)


def shown(driver):
    return [p for p in css(driver, ".panel") if p.is_displayed()]


@pytest.mark.parametrize("width", [1600, 1400, 1024, 700, 390, 360])
def test_fits_every_width_without_a_word_in_the_console(opened, width):
    browser.size(opened, width, 900)
    opened.refresh()
    assert opened.execute_script(WIDTH) <= width
    assert [e["message"] for e in opened.get_log("browser")] == []
    assert opened.execute_script("return document.documentElement.classList.contains('has-js')")


def test_first_screen_holds_verdict_and_cards(opened):
    for selector in ("h1", ".card .big", "nav"):
        for element in css(opened, selector):
            assert element.rect["y"] + element.rect["height"] < 620, selector


def test_click_on_a_version_changes_panel_and_layers(opened):
    assert [p.find_element("css selector", ".who").text for p in shown(opened)] == ["mixed int4/int8 · budget 20 %"]
    before = opened.find_element("id", "layer-rows").text
    mark = css(opened, '.mark[data-point="7"] .shape')[0]
    opened.execute_script("arguments[0].parentNode.dispatchEvent(new MouseEvent('click', {bubbles: true}))", mark)
    (panel,) = shown(opened)
    assert "int4 everywhere" in panel.text
    assert "the budget asks for 99 %" in panel.text
    assert opened.find_element("id", "map-name").text == "int4 everywhere"
    assert opened.find_element("id", "layer-rows").text != before
    assert css(opened, '.mark[data-point="7"]')[0].get_attribute("aria-pressed") == "true"
    assert len(css(opened, ".mark.on")) == 1


def test_a_real_click_lands_on_the_mark(opened):
    mark = css(opened, '.mark[data-point="0"] .shape')[0]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
    opened.execute_script("document.querySelectorAll('.mark').forEach((m) => { m.style.transition = 'none'; })")
    mark.click()
    (panel,) = shown(opened)
    assert panel.text.startswith("original")
    assert opened.find_element("id", "map-told").text.startswith("The original")
    assert opened.find_element("id", "tip").is_displayed()


def test_button_in_the_table_selects_too(opened):
    css(opened, '.pick[data-point="1"]')[0].send_keys("\ue007")
    assert "int8 everywhere" in shown(opened)[0].text


def test_axes_move_the_marks_and_the_ticks(opened):
    def places():
        return [m.get_attribute("transform") for m in css(opened, "#plot .mark")]

    def labels():
        return [t.text for t in css(opened, "#plot .grid text")]

    places_before, labels_before = places(), labels()
    opened.execute_script(
        "const s = document.getElementById('axis-x'); s.value = 'bytes'; s.dispatchEvent(new Event('change'))"
    )
    assert places() != places_before
    assert labels() != labels_before
    assert any("File size" in t for t in labels())
    assert any("MB" in t for t in labels())


def test_keyboard_walks_through_the_versions(opened):
    opened.execute_script("document.querySelector('.mark.on').focus()")
    first = opened.switch_to.active_element
    number = first.get_attribute("data-point")
    first.send_keys("\ue014")  # arrow right
    second = opened.switch_to.active_element
    assert second.get_attribute("data-point") not in (None, number)
    assert shown(opened)[0].get_attribute("id") == f"version-{second.get_attribute('data-point')}"
    second.send_keys("\ue012")  # arrow left
    assert opened.switch_to.active_element.get_attribute("data-point") == number
    assert len([m for m in css(opened, ".mark[tabindex]") if m.get_attribute("tabindex") == "0"]) == 1


def test_cost_tree_opens(opened):
    closed = css(opened, "#cost-tree details:not([open]) > summary")
    leaves = [r for r in css(opened, "#cost-tree .row") if r.is_displayed()]
    assert closed
    closed[0].send_keys("\ue007")
    assert len([r for r in css(opened, "#cost-tree .row") if r.is_displayed()]) > len(leaves)


def test_views_of_the_sensitivities(opened):
    cell = css(opened, ".heat tbody td")[0]
    assert "×10" in cell.text
    opened.execute_script("document.getElementById('view-bytes').click()")
    assert cell.text.endswith("MB")


def test_badge_explains_itself_to_the_keyboard(opened):
    opened.execute_script("document.querySelector('.card .tag').focus()")
    assert example.METER in opened.find_element("id", "tip").text


def test_copy_says_so(opened):
    button = css(opened, '.copy[data-copy="command"]')[0]
    opened.execute_script("arguments[0].click()", button)
    opened.execute_async_script("setTimeout(arguments[0], 300)")
    assert button.text in ("Copied", "Selected")


def test_names_in_the_plot_do_not_cover_each_other(opened):
    for width in (1400, 390):
        browser.size(opened, width, 900)
        opened.refresh()
        boxes = opened.execute_script(
            "return [...document.querySelectorAll('#plot .names text')].filter((t) => t.style.display !== 'none')"
            ".map((t) => { const b = t.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; })"
        )
        assert len(boxes) >= 3
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (width, a, b)


@pytest.mark.parametrize("edge", ["no best", "nothing at all", "300 layers", "missing details", "long names", "text"])
def test_edges_in_the_browser(driver, tmp_path, edge):
    from .test_page import EDGES

    evil = example.result(workload="<script>alert(1)</script>", verdict="<img src=x onerror=alert(1)>")
    path = tmp_path / "edge.html"
    page.write(evil if edge == "text" else EDGES[edge](), path)
    for width in (1400, 390):
        browser.size(driver, width, 900)
        driver.get(path.as_uri())
        assert driver.execute_script(WIDTH) <= width
        assert [e["message"] for e in driver.get_log("browser")] == []
        assert not css(driver, "img")


def test_contrast_is_enough_in_both_schemes(address):
    measure = """
      const root = getComputedStyle(document.documentElement), out = {};
      const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const lum = (name) => {
        context.fillStyle = root.getPropertyValue(name).trim(); context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      for (const name of ['--ink', '--soft', '--good', '--bad']) {
        const [a, b] = [lum(name), lum('--paper')].sort((x, y) => y - x);
        out[name] = (a + 0.05) / (b + 0.05); }
      return out;"""
    for dark in (False, True):
        with browser.browser(dark=dark) as made:
            made.get(address)
            ratios = made.execute_script(measure)
            assert all(r >= 4.5 for r in ratios.values()), ratios


def test_static_content_needs_no_script(address):
    with browser.browser(script=False) as made:
        made.get(address)
        body = made.find_element("css selector", "body").text
        for text in ("99.4 %", "encoder.", "budget asks for 99 %", "2.9×10"):
            assert text in body
        assert len([m for m in css(made, "#plot .mark .shape") if m.is_displayed()]) == 10
        assert not css(made, ".controls")[0].is_displayed()
        summary = css(made, ".panel:not(.on) > summary")
        assert summary
        assert all(s.is_displayed() for s in summary)
