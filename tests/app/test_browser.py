"""The app in a real browser: pages, addresses, keyboard, colours, and what must never happen to a token.

The `tab` fixture checks after each test that no other host was asked for anything, that no script failed, and that
nothing in the hostile tokens and names has run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dictlearn.feature_index.index import open_index
from dictlearn.feature_index.read import feature_page
from dictlearn.token_text import shown
from dictlearn.training.records import open_record, training
from dictlearn.workspace import Workspace
from tests.app.conftest import serving
from tests.app.tiny_workspace import HOSTILE, HOSTILE_DOCUMENT

try:
    from playwright.sync_api import expect
except ImportError:  # the chromium fixture says so, as a skip or, where a browser is required, as a failure
    expect = None

pytestmark = pytest.mark.needs("browser")

MARKS = {
    "Home": "Feature indexes",
    "Store": "norm of the mean",
    "Runs": "Where the configurations differ",
    "Compare": "Latents of two runs",
    "Features": "strongest example",
    "Feature": "Largest activations",
    "Circuit": "Most influential features",
}
"""What each page shows and no other does."""


def test_every_page_opens_from_the_navigation(tab: Any) -> None:
    tab.show()
    for name, mark in MARKS.items():
        tab.get_by_role("link", name=name, exact=True).first.click()
        expect(tab.get_by_text(mark, exact=True)).to_be_visible()
        expect(tab.get_by_role("heading", level=1)).to_have_count(1)


def test_there_is_no_folder_that_streamlit_would_take_for_its_own_pages() -> None:
    """With one, the first deep link that a fresh server is asked for would run a page without main.py."""
    assert not (Path(__file__).resolve().parents[2] / "app" / "pages").exists()


# --- the address is the state -----------------------------------------------------------------------------------------


def test_a_pasted_address_restores_the_table(tab: Any) -> None:
    tab.show("features?index=sae&search=import&sort=density&ascending=1")
    expect(tab.get_by_label("Search")).to_have_value("import")
    expect(tab.locator("th[aria-sort=ascending]")).to_have_text("density ↑")
    first = tab.locator("tbody tr").first.inner_text()
    tab.reload()
    expect(tab.locator("tbody tr").first).to_have_text(re.compile(re.escape(first.split()[0])))


def test_what_is_chosen_is_written_to_the_address(tab: Any) -> None:
    tab.show("features?index=sae")
    tab.get_by_role("link", name="density", exact=True).click()
    expect(tab).to_have_url(re.compile(r"sort=density"))
    tab.get_by_label("Search").fill("self")
    tab.get_by_label("Search").press("Enter")
    expect(tab).to_have_url(re.compile(r"search=self&sort=density|sort=density&search=self"))


@pytest.mark.parametrize("pause", [20, 60])
def test_a_search_right_after_a_click_keeps_what_was_clicked(tab: Any, pause: int) -> None:
    tab.show("features?index=sae")
    density = tab.get_by_role("link", name="density", exact=True)
    density.wait_for()
    tab.get_by_label("Search").fill("self")
    density.evaluate(
        """async (link, pause) => {
          const field = document.querySelector('input[aria-label="Search"]');
          field.focus();
          link.click();
          await new Promise((resolve) => setTimeout(resolve, pause));
          const enter = { key: "Enter", code: "Enter", keyCode: 13, bubbles: true };
          for (const kind of ["keydown", "keypress", "keyup"]) field.dispatchEvent(new KeyboardEvent(kind, enter));
        }""",
        pause,
    )
    expect(tab).to_have_url(re.compile(r"search=self&sort=density|sort=density&search=self"))


def test_back_takes_back_what_was_chosen_a_moment_ago(tab: Any) -> None:
    tab.show("feature?index=sae&latent=9")
    tab.get_by_role("button", name="next").click()
    expect(tab.get_by_role("heading", name="Latent 10", exact=True)).to_be_visible()
    tab.go_back()
    expect(tab.get_by_role("heading", name="Latent 9", exact=True)).to_be_visible()
    expect(tab).to_have_url(re.compile("latent=9$"))
    expect(tab.get_by_label("Latent", exact=True)).to_have_value("9")


def test_the_address_of_a_page_is_not_carried_to_another(tab: Any) -> None:
    tab.show("features")
    tab.locator("tbody tr").first.wait_for()
    tab.get_by_label("Search").fill("self")
    tab.get_by_label("Search").press("Enter")
    expect(tab).to_have_url(re.compile(r"search=self"))
    tab.get_by_role("link", name="Store", exact=True).click()  # its address has no parameters, as the other's had
    expect(tab.get_by_role("combobox", name="Document")).to_be_visible()
    expect(tab).to_have_url(re.compile(r"/store$"))


@pytest.mark.parametrize("pause", [20, 60])
def test_what_the_browser_has_not_drawn_yet_is_not_taken_for_a_wish(tab: Any, pause: int) -> None:
    tab.show("feature?index=sae&latent=9")
    next_one = tab.get_by_role("button", name="next")
    next_one.wait_for()
    tab.locator("[data-test-script-state=notRunning]").wait_for()
    next_one.evaluate(
        """async (button, pause) => {
          const toggle = document.querySelector('input[aria-label="Whole passages"]');
          button.click();
          await new Promise((resolve) => setTimeout(resolve, pause));
          toggle.click();
        }""",
        pause,
    )
    expect(tab).to_have_url(re.compile(r"latent=10&wrapped=1$"))
    expect(tab.get_by_role("heading", name="Latent 10", exact=True)).to_be_visible()
    expect(tab.get_by_label("Latent", exact=True)).to_have_value("10")
    expect(tab.get_by_role("switch", name="Whole passages")).to_be_checked()


def test_a_row_opens_its_feature_and_back_returns(tab: Any) -> None:
    tab.show("features?index=sae&sort=density")
    latent = tab.locator("tbody tr").nth(2).locator("th").inner_text().strip()
    tab.locator("tbody tr").nth(2).locator("td.right").first.click()
    expect(tab.get_by_role("heading", name=f"Latent {latent}", exact=True)).to_be_visible()
    expect(tab).to_have_url(re.compile(f"/feature\\?index=sae&latent={latent}$"))
    tab.locator(".cell a, table a").first.click()
    expect(tab.get_by_role("heading", name=f"Latent {latent}", exact=True)).to_have_count(0)
    tab.go_back()
    expect(tab.get_by_role("heading", name=f"Latent {latent}", exact=True)).to_be_visible()
    tab.go_back()
    expect(tab).to_have_url(re.compile("/features\\?index=sae&sort=density$"))
    expect(tab.locator("th[aria-sort=descending]")).to_have_text("density ↓")


def test_a_name_that_is_not_there_is_said(tab: Any) -> None:
    tab.show("feature?index=<b>nowhere</b>&latent=5")
    expect(tab.get_by_role("alert").first).to_contain_text("There is no index '<b>nowhere</b>' in this workspace")


# --- features ---------------------------------------------------------------------------------------------------------


def test_arrow_keys_step_through_features(tab: Any) -> None:
    tab.show("feature?index=sae&latent=5")
    for key, latent in (("ArrowRight", 6), ("ArrowRight", 7), ("ArrowLeft", 6)):
        tab.locator(".strip").first.wait_for()
        tab.locator("[data-test-script-state=notRunning]").wait_for()
        tab.wait_for_timeout(500)  # Streamlit listens for shortcuts a moment after it has drawn their buttons
        tab.keyboard.press(key)
        expect(tab.get_by_role("heading", name=f"Latent {latent}", exact=True)).to_be_visible()
        expect(tab).to_have_url(re.compile(f"latent={latent}$"))
        expect(tab.get_by_label("Latent", exact=True)).to_have_value(str(latent))


def test_strips_are_walked_and_opened_by_keyboard(tab: Any) -> None:
    tab.show("feature?index=sae&latent=5")
    strips = tab.locator(".strip")
    strips.first.focus()
    tab.keyboard.press("ArrowDown")
    expect(strips.nth(1)).to_be_focused()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_role("tooltip").last).to_contain_text("activation")
    expect(tab.get_by_role("heading", name="Latent 5", exact=True)).to_be_visible()
    tab.keyboard.press("Enter")
    expect(strips.nth(1)).to_have_attribute("aria-expanded", "true")
    assert strips.nth(1).get_attribute("aria-label").startswith("activation ")


def test_a_note_is_kept(tab: Any) -> None:
    tab.show("feature?index=sae&latent=9")
    field = tab.get_by_label("Note", exact=True)
    field.fill("<b>dots</b> and **stars**")
    field.press("Enter")
    expect(tab.get_by_text("Note kept", exact=True)).to_be_visible()  # what is on its way when a page closes is lost
    tab.show("features?index=sae&search=dots")
    expect(tab.locator("tbody tr")).to_have_count(1)
    expect(tab.locator("tbody td").last).to_have_text("<b>dots</b> and **stars**")


def test_long_tokens_leave_room_for_the_numbers_beside_them(tab: Any) -> None:
    tab.show("feature?index=sae&latent=9")
    tables = tab.locator(".cell .scroll")
    tables.first.wait_for()
    assert len(tables.all()) >= 2
    # The longest tokens there are, whatever this latent raises.
    tab.locator(".cell .token").evaluate_all("tokens => tokens.forEach(token => (token.textContent = 'm'.repeat(40)))")
    assert [one.evaluate("node => node.scrollWidth - node.clientWidth") for one in tables.all()] == [0] * tables.count()


def test_an_example_leads_to_its_text_in_the_store(tab: Any) -> None:
    tab.show("feature?index=sae&latent=5")
    tab.locator(".strip .source a").first.click()
    expect(tab.get_by_text("norm of the mean", exact=True)).to_be_visible()
    assert "/store?store=stdlib&row=" in tab.url


# --- text stays text --------------------------------------------------------------------------------------------------


def test_hostile_tokens_are_text_in_a_store(tab: Any) -> None:
    tab.show("store?store=stdlib")
    tab.locator(".t").first.wait_for()
    for text in (shown(token.encode()) for token in HOSTILE):
        span = tab.locator(".t", has_text=re.compile(f"^{re.escape(text)}$")).first
        expect(span).to_be_visible()
        assert span.evaluate("node => node.childElementCount") == 0
        span.hover()
        expect(tab.locator(".strips .tooltip")).to_contain_text(text)


@pytest.mark.parametrize("wrapped", [0, 1])
def test_hostile_tokens_are_text_on_the_page_of_a_feature(tab: Any, tiny: Path, wrapped: int) -> None:
    index = open_index(tiny / "indexes" / "sae.zarr")
    hostile = {shown(token.encode()) for token in HOSTILE}
    on_page = {
        latent: {token for band in feature_page(index, latent).bands for strip in band.strips for token in strip.tokens}
        for latent in range(0, index.d_sae, 3)
    }
    latent = max(on_page, key=lambda latent: len(on_page[latent] & hostile))
    tab.show(f"feature?index=sae&latent={latent}&wrapped={wrapped}")
    tab.locator(".strip").first.wait_for()
    assert len(on_page[latent] & hostile) >= 3
    assert on_page[latent] & hostile <= {text.replace("\n", "") for text in tab.locator(".t").all_text_contents()}


def test_hostile_names_and_tokens_are_text_everywhere_else(tab: Any) -> None:
    tab.show("store?store=stdlib")
    expect(tab.get_by_role("heading", name=HOSTILE_DOCUMENT)).to_be_visible()
    expect(tab.get_by_role("combobox", name="Document")).to_have_value(HOSTILE_DOCUMENT)
    tab.show("circuit?graph=import-sys")
    expect(tab.get_by_role("heading", level=1)).to_contain_text(HOSTILE[0])
    expect(tab.locator(".node.logit").first).to_be_visible()
    tab.show()
    expect(tab.get_by_role("row", name=re.compile("import-sys"))).to_contain_text(HOSTILE[0])
    tab.show("features?index=sae&search=" + "script")
    tab.locator("table, .empty").first.wait_for()
    for kind in ("script", "img", "b", "iframe"):
        assert tab.locator(f".root {kind}").count() == 0


# --- circuits ---------------------------------------------------------------------------------------------------------


def test_a_node_is_pointed_at_pinned_and_followed(tab: Any, tiny: Path) -> None:
    nodes = json.loads((tiny / "graphs" / "import-sys.json").read_text())["nodes"]
    feature = max((n for n in nodes if n["kind"] == "feature" and n["kept"]), key=lambda node: node["influence"])
    tab.show("circuit?graph=import-sys")
    node = tab.locator(f".node.feature[aria-label^='latent {feature['latent']},']").first
    node.hover()
    expect(tab.locator(".panel h2")).to_have_text(f"latent {feature['latent']}")
    expect(tab.locator(".panel")).to_contain_text("Residue")
    node.click()
    expect(tab).to_have_url(re.compile(r"node=feature"))
    expect(tab.get_by_text(f"What latent {feature['latent']} of layer 2 fires on")).to_be_visible()
    tab.locator(".node.pinned").click()
    expect(tab.get_by_role("heading", name=f"Latent {feature['latent']}", exact=True)).to_be_visible()
    assert "/feature?index=transcoder-2" in tab.url


def test_the_sliders_hide_nodes_and_edges_without_asking_the_server(tab: Any) -> None:
    tab.show("circuit?graph=import-sys")
    count = tab.locator(".controls .muted").first
    before = re.findall(r"\d+", count.inner_text())
    tab.get_by_label("least share of its target's inputs").fill("70")
    tab.get_by_label("least influence of a node").fill("80")
    after = re.findall(r"\d+", count.inner_text())
    assert int(after[0]) < int(before[0]) and int(after[2]) < int(before[2])
    assert "graph=import-sys" in tab.url


def test_the_graph_is_walked_by_keyboard(tab: Any) -> None:
    tab.show("circuit?graph=import-sys")
    start = tab.locator(".node[tabindex='0']")
    start.focus()
    first = tab.locator(".panel h2").inner_text()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator(".panel h2")).not_to_have_text(first)
    tab.keyboard.press("Enter")
    expect(tab).to_have_url(re.compile(r"node="))


# --- runs side by side ------------------------------------------------------------------------------------------------


def settled(tab: Any, locator: Any) -> dict[str, float]:
    """The box of an element that has stopped moving: above it, widgets are loaded late and push it from the pointer."""
    before, box = None, locator.bounding_box()
    while box != before:
        tab.wait_for_timeout(300)
        before, box = box, locator.bounding_box()
    return box


def test_a_point_says_which_run_it_is_and_opens_it(tab: Any) -> None:
    tab.show("compare?store=stdlib")
    figure = tab.locator("figure.large")
    expect(figure.locator(".mark")).to_have_count(1)
    target = figure.locator(".target")
    settled(tab, target)
    x, y = figure.evaluate(
        """figure => {
          const [mark, target] = [".mark", ".target"].map((name) => figure.querySelector(name).getBoundingClientRect());
          return [mark.x + mark.width / 2 - target.x, mark.y + mark.height / 2 - target.y];
        }"""
    )
    target.hover(position={"x": x + 6, "y": y})
    expect(tab.locator(".tradeoffs .tooltip")).to_contain_text("sae")
    expect(tab.locator(".tradeoffs .tooltip")).to_contain_text("L0 8, FVU 0.2")
    expect(tab.locator(".mark.picked")).to_have_count(5)  # the same run in every panel
    target.hover(position={"x": x + 200, "y": y})
    expect(tab.locator(".mark.picked")).to_have_count(0)
    target.click(position={"x": x, "y": y})
    expect(tab).to_have_url(re.compile(r"/runs\?runs=sae$"))


def test_what_is_compared_is_written_to_the_address_and_taken_along(tab: Any) -> None:
    tab.show("compare?store=stdlib")
    tab.get_by_role("link", name="FVU", exact=True).click()
    expect(tab).to_have_url(re.compile(r"compare\?.*sort=fvu"))
    expect(tab.locator("th[aria-sort=descending]")).to_have_text("FVU ↓")
    with tab.expect_download() as taken:
        tab.get_by_role("button", name="Download as CSV").click()
    lines = Path(taken.value.path()).read_text().splitlines()
    assert lines[0].startswith("run,kind,latents,seed,store,") and [line.split(",")[0] for line in lines[1:]] == ["sae"]
    tab.get_by_role("combobox", name="Input and target").click()
    tab.get_by_role("option", name=re.compile("→")).click()
    expect(tab).to_have_url(re.compile(r"hooks=blocks.2.mlp.hook_in"))
    expect(tab.get_by_role("link", name="transcoder-2", exact=True).first).to_be_visible()


def test_charts_are_drawn_anew_where_the_window_becomes_narrow(tab: Any) -> None:
    tab.show("compare?store=stdlib")
    expect(tab.locator("figure")).to_have_count(6)  # five panels and the histogram of cosines
    expect(tab.locator("figure.large")).to_have_count(1)
    tab.set_viewport_size({"width": 480, "height": 900})
    expect(tab.locator("figure.large")).to_have_count(0)
    expect(tab.locator(".tradeoffs figure")).to_have_count(5)


# --- looks ------------------------------------------------------------------------------------------------------------

CONTRASTS = """() => {
    const channels = (text) => {
        const numbers = text.match(/-?[0-9.]+/g).map(Number);
        return text.startsWith('color(') ? numbers.slice(0, 3).map((x) => x * 255) : numbers.slice(0, 3);
    };
    const luminance = (text) => {
        const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = channels(text).map((x) => linear(x / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const roots = [...document.querySelectorAll('*')].filter((n) => n.shadowRoot).map((n) => n.shadowRoot);
    const found = {};
    for (const selector of ['h1', 'a', '.note', 'thead th', 'dt', '.head', '.source', '.title .muted']) {
        const node = roots.map((root) => root.querySelector(selector)).find(Boolean);
        if (!node) continue;
        const paper = luminance(getComputedStyle(document.querySelector('.stApp')).backgroundColor);
        const ink = luminance(getComputedStyle(node).color);
        found[selector] = (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
    }
    return [found, getComputedStyle(document.querySelector('.stApp')).backgroundColor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_text_is_legible(tab: Any, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.show("feature?index=sae&latent=5")
    tab.locator(".strip").first.wait_for()
    tab.locator(".histogram").first.wait_for()
    contrasts, paper = tab.evaluate(CONTRASTS)
    assert paper == {"light": "rgb(253, 253, 251)", "dark": "rgb(22, 22, 21)"}[scheme]
    assert len(contrasts) == 8
    assert {name: round(ratio, 2) for name, ratio in contrasts.items() if ratio < 4.5} == {}


def test_a_narrow_window_is_not_scrolled_sideways(tab: Any) -> None:
    overflow = "() => document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth"
    tab.show()
    for name, mark in MARKS.items():
        tab.set_viewport_size({"width": 1400, "height": 900})
        tab.get_by_role("link", name=name, exact=True).first.click()
        expect(tab.get_by_text(mark, exact=True)).to_be_visible()
        tab.set_viewport_size({"width": 480, "height": 900})
        tab.wait_for_timeout(300)
        assert (name, tab.evaluate(overflow)) == (name, 0)


# --- while a run trains -----------------------------------------------------------------------------------------------


def test_curves_grow_while_a_run_trains_and_a_deep_link_is_first(tab: Any, own: Path, tmp_path: Path) -> None:
    """On a fresh server, whose very first address is a deep link."""
    files = Workspace(own).run("training")
    line = {**files.last_metrics(), "step": 180, "rows": 180 * 4096}
    with serving(own, tmp_path) as server:
        tab.show("runs?runs=training&x=step", server=server)
        state = tab.get_by_role("row", name=re.compile("^training topk"))
        expect(state).to_contain_text("interrupted, at step 170 of 400")
        tab.locator(".target").first.hover()
        with training(files), open_record(files, 170, tensorboard=False, wandb=None, config={}) as record:
            record.write(line)
            expect(state).to_contain_text("training, at step 180 of 400")
            expect(tab.locator(".legend .state")).to_have_text("training")
            assert tab.locator(".curve path").first.get_attribute("d").count("L") == 17
            expect(tab.locator(".readout").first).not_to_be_empty()  # the pointer still rests there
        expect(state).to_contain_text("interrupted, at step 180 of 400")
        tab.goto("about:blank")


def test_of_many_runs_the_pointer_picks_the_nearest(tab: Any, own: Path, tmp_path: Path) -> None:
    lines = (own / "runs" / "sae" / "metrics.jsonl").read_text().splitlines()
    for seed in range(9):
        folder = own / "runs" / f"seeds-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"name: seeds-{seed}\nsweep: seeds\nseed: {seed}\n")
        higher = [{**json.loads(line), "l0": 10 + seed, "fvu": 1 + seed} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in higher))
    with serving(own, tmp_path) as server:
        tab.show("runs?sweep=seeds", server=server)
        expect(tab.locator(".legend .name")).to_have_text([str(seed) for seed in range(9)])
        panel = tab.locator("figure", has_text="L0")
        for share, seed in ((0.05, 8), (0.95, 0)):
            target = panel.locator(".target")
            box = settled(tab, target)
            target.hover(position={"x": box["width"] / 2, "y": box["height"] * share})
            expect(panel.locator(".readout span")).to_have_text([str(10 + seed)])
            expect(tab.locator(".legend .picked .name")).to_have_text([str(seed)])
            expect(panel.locator(".curve.other")).to_have_count(8)
        tab.mouse.move(5, 5)
        expect(tab.locator(".curve.other")).to_have_count(0)
        tab.goto("about:blank")
