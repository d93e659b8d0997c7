"""The page holds what the records say, loads nothing, and works in a browser: sorting, values, both widths."""

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.html_page import Checked
from helpers.records import RECORDS, record, table

from hf_actcompress.report import build_page
from hf_actcompress.report.charts import Frame, ticks
from hf_actcompress.report.comparison import load_comparison

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return build_page(RECORDS, [load_comparison(table(tmp_path_factory.mktemp("t") / "sort", throughput=True))])


def test_tables_say_what_the_records_say(page):
    sst2, theirs = Checked(page).tables
    assert sst2[0][:4] == ["forward", "backward", "seeds", "compressed"]
    block = ["block:bits=4", "block:bits=8", "2", "89.0 ± 1.4", "92.0 ± 1.4", "3.0", "1.5", "2.67", "1.33", "0.150"]
    assert block in sst2
    assert sst2[1][:5] == ["none", "none", "3", "-", "92.0 ± 2.0"]
    assert ["sort, 8 bits", "95.7 (once)", "88.0", "1", "4.0", "2.67", "0.900 (0.850-0.950)"] in theirs


def test_it_loads_nothing_and_names_are_unique(page):
    found = Checked(page).found
    for tag, attributes in found:
        for name in ("src", "href", "data", "action", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttpRequest", page)
    names = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"][1:] for tag, attributes in found if tag == "a"]
    assert set(links) <= set(names)


def test_plots_carry_their_values(page):
    charts = [attributes for tag, attributes in Checked(page).found
              if attributes.get("class", "").startswith("chart ")]
    assert [chart["class"].split()[1] for chart in charts] == ["wide", "narrow"] * 2
    hits = json.loads(charts[0]["data-hits"])
    assert len(hits) == 3
    told = dict(hits[0][3])
    assert (told["codec"], told["accuracy, %"], told["ratio"]) == ("sort:bits=8", "70.0", "2.00×")
    curve = json.loads(charts[2]["data-hits"])
    assert [hit[2] for hit in curve] == ["step 1", "step 2", "step 3"]
    assert curve[1][1][0][:2] == ["no compression", "0.5"]
    assert all("Arrow keys" in chart["aria-label"] for chart in charts)


def test_configurations_are_all_there(page):
    blocks = [json.loads(html.unescape(text)) for text in re.findall(r"<pre>(.*?)</pre>", page, re.S)]
    assert [block["codec"] for block in blocks][: len(RECORDS)] == [item["codec"] for item in RECORDS]
    assert blocks[3]["config"]["grad_codec"] == "block:bits=8"


def test_text_from_records_is_escaped():
    bad = "<script>alert(1)</script>"
    page = build_page([record(), record("sort:bits=8", 0, 0.9, 0.8)], title=bad)
    assert bad not in page and html.escape(bad) in page
    spec = 'sort:bits=8"><script>'
    assert spec not in build_page([record(), record(spec, 0, 0.9, 0.8)])


def test_odd_records_make_a_page():
    """Nothing measured, one run, values that are no numbers, no history."""
    Checked(build_page([record()]))
    Checked(build_page([record("sort:bits=8", compressed="nan", compression=[], history=[])]))
    Checked(build_page([record("sort", 0, 0.9, 0.9, history=[{"step": 1, "loss": 2}], environment={"torch": "2"})]))
    with pytest.raises(ValueError, match="nothing to show"):
        build_page([])


def test_ticks_and_places():
    assert ticks(0, 1, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0][: len(ticks(0, 1, 5))] or len(ticks(0, 1, 5)) <= 6
    for low, high in ((0.123, 0.987), (-3, 17), (93.1, 93.4), (0, 1e-4)):
        found = ticks(low, high, 6)
        assert 2 <= len(found) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    frame = Frame((200, 100), (1, 100), (0, 1), log=True, left=50, right=50, top=10, bottom=10)
    assert (frame.at_x(1), frame.at_x(10), frame.at_x(100)) == (50, 100, 150)
    assert (frame.at_y(0), frame.at_y(1)) == (90, 10)


PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table"), head = [...table.querySelectorAll("thead th")];
  const column = (i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
  const result = {};
  const ratio = head.findIndex((th) => th.textContent === "ratio");
  const click = (i) => head[i].querySelector("button").click();
  click(ratio); click(ratio); result.falling = column(ratio);
  click(ratio); result.rising = column(ratio);
  const drop = head.findIndex((th) => th.textContent === "drop");
  click(drop); result.drop = column(drop); result.sorted = head.map((th) => th.getAttribute("aria-sort"));
  const chart = [...document.querySelectorAll(".chart")].find((one) => one.getClientRects().length);
  const hit = JSON.parse(chart.dataset.hits)[0], frame = chart.getBoundingClientRect();
  const scale = frame.width / chart.viewBox.baseVal.width;
  const move = (clientX, clientY) => chart.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
  move(frame.left + hit[0] * scale + 3, frame.top + hit[1] * scale + 3);
  result.tip = document.getElementById("tip").textContent;
  const tip = document.getElementById("tip").getBoundingClientRect();
  result.inside = tip.left >= 0 && tip.right <= innerWidth;
  move(-500, -500); result.hidden = document.getElementById("tip").hidden;
  chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  result.said = document.getElementById("say").textContent;
  const field = document.querySelector("[data-find]");
  field.value = "sort:bits=8"; field.dispatchEvent(new Event("input"));
  result.count = document.querySelector(".count").textContent;
  result.kind = chart.getAttribute("class");
  result.width = [document.documentElement.scrollWidth, innerWidth];
  result.small = [...document.querySelectorAll(".chart text")].filter((text) => text.getClientRects().length)
    .map((text) => parseFloat(getComputedStyle(text).fontSize) * scale).sort((a, b) => a - b)[0];
  parent.postMessage(JSON.stringify(result), "*");
});
</script></body>"""
# Frames, because a window of a browser has a least width; the page in one behaves as on a screen of that width.
FRAMES = """<!doctype html><body><pre></pre><script>
addEventListener("message", (event) => {{ document.querySelector("pre").append(event.data + "\\n"); }});
</script>{}</body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_in_a_browser(page, tmp_path):
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE))
    frames = "".join(f'<iframe src="page.html" style="width:{w}px;height:900px"></iframe>' for w in (390, 1280))
    (tmp_path / "frames.html").write_text(FRAMES.format(frames))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
         "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    text = html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)[1])
    results = [json.loads(line) for line in text.splitlines()]
    assert len(results) == 2, done.stderr[-2000:]
    for result in results:
        assert result["falling"] == ["2.67", "2.67", "2.00", "1.00"]
        assert result["rising"] == ["1.00", "2.00", "2.67", "2.67"]
        assert result["drop"] == ["3.0", "22.0", "22.0", "-"]  # no value comes last
        assert [s for s in result["sorted"] if s] == ["ascending"]
        assert "sort:bits=8" in result["tip"] and "70.0" in result["tip"] and result["inside"] and result["hidden"]
        assert "codec" in result["said"]
        assert result["count"] == "2 of 9 runs"
        assert result["width"][0] <= result["width"][1]  # nothing runs out of the page
        assert result["small"] >= 9.5
    assert {result["kind"].split()[1]: result["width"][1] for result in results} == {"narrow": 390, "wide": 1280}
