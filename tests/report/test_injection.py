"""Names from records are text everywhere: in HTML, in the data of the page's script, in Markdown, in figures."""

import json
import re

import pytest
from helpers.html_page import Checked
from helpers.records import record, table

from hf_actcompress.report import build_page
from hf_actcompress.report.comparison import comparison_section, load_comparison
from hf_actcompress.report.plots import accuracy_vs_ratio, loss_curves
from hf_actcompress.report.tables import BEGIN, END, accuracy_section, write_results_page

EVIL = "x\"'><img src=x onerror=alert(1)></script></style><!-- js --><a href=\"javascript:alert(2)\">&lt;|$x^{$ \\n"


def evil_records(name):
    """`name` at every place of a record that holds text."""
    more = {"task": name, "model": name, "data": name, "dtype": name, "batch_size": name, "image_size": name,
            "environment": {name: name}}  # fmt: skip
    config = {"grad_codec": name, "first": name, "last": name, "placement": name, name: name}
    records = [record(seed=name, **more), record(name, seed=name, compressed=0.8, config=config, **more)]
    for each in records:
        each["metrics"][name] = {name: name}
    return records


def evil_comparison(folder, name):
    path = table(folder / "sort", throughput=True)
    index = json.loads(path.read_text())
    for key in ("title", "theirs", "differs", "command"):
        index[key] = name
    for number, row in enumerate(index["rows"]):
        row |= {"label": name, "task": f"{name}{number}", "theirs": {name: name}}
    path.write_text(json.dumps(index))
    return load_comparison(path)


def structure(page):
    """Tags, the names of their attributes, and all values but those that hold text."""
    texts = ("data-hits", "data-v", "aria-label", "id", "href", "d", "points", "x", "y", "transform", "class")
    return [(tag, sorted((key, "" if key in texts else value) for key, value in attributes.items()))
            for tag, attributes in Checked(page).found]  # fmt: skip


def test_nothing_on_the_page_becomes_markup(tmp_path):
    evil = build_page(evil_records(EVIL), [evil_comparison(tmp_path / "a", EVIL)], title=EVIL)
    plain = build_page(evil_records("plain name:"), [evil_comparison(tmp_path / "b", "plain name:")], title="plain")
    # Long names may be divided by <wbr>, and labels left out of a plot; everything else is the same.
    allowed = ("wbr", "text")
    assert [t for t in structure(evil) if t[0] not in allowed] == [t for t in structure(plain) if t[0] not in allowed]
    found = Checked(evil).found
    assert not any(key.startswith("on") for _, attributes in found for key in attributes)
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) for name in ids)
    links = [attributes["href"] for tag, attributes in found if tag == "a"]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert len(re.findall("</script", evil)) == len(re.findall("</style", evil)) == 1
    hits = [json.loads(attributes["data-hits"]) for _, attributes in found if "data-hits" in attributes]
    assert any(EVIL in json.dumps(hit).encode().decode("unicode_escape") or EVIL in str(hit) for hit in hits)


@pytest.mark.parametrize("names", [("a b", "a-b"), ("ä", "ö"), ("a b", "a-b-2", "a?b"), ("", " ")])
def test_tasks_have_anchors_of_their_own(names):
    page = build_page([record(task=name) for name in names])
    found = Checked(page).found
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    links = {attributes["href"][1:] for tag, attributes in found if tag == "a"}
    assert len(ids) == len(set(ids)) and links <= set(ids)
    assert sum(name.startswith("task-") for name in links) == len(names)


def test_names_in_markdown_stay_in_their_cells(tmp_path):
    name = f"a|b\n| c |\n<b> {END}"
    records = [record(task=name), record(name, compressed=0.8, task=name)]
    text = accuracy_section(records)
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<b>" not in text and END not in text and lines[0].startswith("### a")
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\nmine")
    for _ in range(2):  # the markers are still there once each
        write_results_page(page, records)
    assert page.read_text().endswith(f"{END}\nmine")
    section = comparison_section(evil_comparison(tmp_path, name))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_names_in_figures(tmp_path):
    records = evil_records(EVIL)
    for path in (accuracy_vs_ratio({EVIL: records}, tmp_path / "a.png"), loss_curves(records, tmp_path / "b.png")):
        assert path.stat().st_size > 5_000
