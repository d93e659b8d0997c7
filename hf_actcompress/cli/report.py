"""`hf-actcompress report`: result records become tables, figures and one page to look at."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.comparison import (
    comparison_columns,
    comparison_notes,
    comparison_section,
    find_indices,
    load_comparison,
)
from ..report.page import build_page
from ..report.plots import accuracy_vs_ratio, accuracy_vs_throughput, loss_curves
from ..report.records import Record, load_records
from ..report.tables import (
    BEGIN,
    END,
    Column,
    Section,
    accuracy_columns,
    accuracy_section,
    accuracy_sections,
    environments,
    legend_of,
    write_results_page,
)
from .common import UNLIMITED, Help, make_console, print_json, print_table

TABLES = ("<!-- generated: tables -->", "<!-- end: tables -->")
EXAMPLES = f"""examples:
  hf-actcompress report outputs                              # the tables; as Markdown into a pipe or file
  hf-actcompress report outputs --html report.html           # one page for a browser; it needs no network
  hf-actcompress report outputs --page results.md --figures figures
  hf-actcompress report benchmarks/results/accuracy --tables benchmarks/results/tables --html report.html

--page fills what stands between these two lines, and with --tables also between the next two:
  {BEGIN}
  {END}
  {TABLES[0]}
  {TABLES[1]}
The rest of the page stays as it is.
"""


def add_parser(commands: Any) -> None:
    what = "tables, figures and a page for the browser, made of result records"
    parser = commands.add_parser(
        "report", help=what, epilog=EXAMPLES, formatter_class=Help,
        description=f"Makes {what}. Records are the results.json of the recipes and the files of benchmarks/. Runs of "
        "one task must agree in model, data, length and cuts; seeds are averaged. Nothing is computed anew.",
    )  # fmt: skip
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="folder with the records; sub-folders count")
    add("--tables", type=Path, metavar="DIR", help="folder of benchmarks/tables.py: ours beside what others measured")
    add("--page", type=Path, metavar="FILE", help="Markdown file to fill between its markers (see below)")
    add("--figures", type=Path, metavar="DIR", help="write accuracy_vs_ratio.png, loss_curves.png and "
        "accuracy_vs_throughput.png (needs matplotlib)")  # fmt: skip
    add("--html", type=Path, metavar="FILE", help="write one self-contained page: sortable tables, plots with values "
        "under the pointer, every run's configuration")  # fmt: skip
    add("--title", default="Activation compression: results", help="of that page (default: %(default)s)")
    add("--json", action="store_true", help="print the rows of the tables as JSON instead")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    if args.figures:
        _need_matplotlib()
    records = load_records(args.results)
    comparisons = [load_comparison(path) for path in find_indices(args.tables)] if args.tables else []
    sections = accuracy_sections(records)  # refuses runs that do not compare before anything is written
    written = []
    figures: dict[str, Path] = {}
    if args.figures:
        figures = draw(records, comparisons, args.figures)
        written += figures.values()
    if args.page:
        write_results_page(args.page, records, figures)
        if comparisons:
            text = "\n\n".join(map(comparison_section, comparisons))
            write_results_page(args.page, text=text, markers=TABLES)
        written.append(args.page)
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(build_page(records, comparisons, args.title), encoding="utf-8")
        written.append(args.html)
    if args.json:
        kept = [{key: value for key, value in table.items() if key != "records"} for table in comparisons]
        print_json({"rows": [row for section in sections for row in section.rows], "tables": kept})
    elif not written and make_console().width < UNLIMITED:
        _print(sections, comparisons, environments(records))
    elif not written:
        print("\n\n".join([accuracy_section(records), *map(comparison_section, comparisons)]))
    else:
        print(f"{len(records)} records -> {', '.join(map(str, written))}")


def _print(sections: Sequence[Section], comparisons: Sequence[dict[str, Any]], machines: Sequence[str]) -> None:
    """The same as the Markdown, fitted into a terminal."""
    console = make_console()
    for task, about, rows in sections:
        _print_rows(f"{task}: {about}", rows, accuracy_columns(), keys=("forward", "backward", "compressed"),
                    drop=("in std", "rel. error", "backward ratio", "seeds", "drop"),
                    last=("backward", "plain"))  # fmt: skip
    for comparison in comparisons:
        _print_rows(comparison["title"], comparison["rows"], comparison_columns(comparison),
                    drop=("seeds", "ours: samples/s over none", "drop", "ratio"))  # fmt: skip
        console.print(f"{comparison_notes(comparison)}\n", style="dim")
    notes = [legend_of(row for section in sections for row in section.rows)]
    for note in [*notes, *(f"Environment: {machine}." for machine in machines)]:
        console.print(f"{note}\n", style="dim")


def _print_rows(title: str, rows: Sequence[Any], columns: Sequence[Column], **options: Sequence[str]) -> None:
    left = [c.name for c in columns if not all(isinstance(c.value(row), int | float | None) for row in rows)]
    cells = [[" ".join(column.text(row).split()) for column in columns] for row in rows]
    print_table(title, [column.name for column in columns], cells, left=left, **options)


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figures needs matplotlib: pip install 'hf_actcompress[plots]'.")


def draw(records: Sequence[Record], comparisons: Sequence[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """{title: PNG} of what the records allow."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    ratio = accuracy_vs_ratio(by_task, folder / "accuracy_vs_ratio.png")
    figures = {"Metric against forward compression ratio": ratio}
    if any("loss" in entry for record in records for entry in record.get("history") or ()):
        figures["Training loss"] = loss_curves(records, folder / "loss_curves.png")
    panels = {table["title"]: [row for row in table["rows"] if row["speed"] and row["ours"]] for table in comparisons}
    panels = {title: rows for title, rows in panels.items() if len(rows) > 1}
    if panels:
        figures["Metric against throughput"] = accuracy_vs_throughput(panels, folder / "accuracy_vs_throughput.png")
    return figures
