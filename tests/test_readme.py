"""The first snippet of the README runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_snippet_runs_and_prints_ratios(capsys):
    snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(snippet, str(README), "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    ratios = {tuple(line.split()[:2]): float(line.split()[-3]) for line in lines}
    assert {float(line.split()[-3]) > 4 for line in lines} == {True}, lines
    assert any("saved" in key[0] for key in ratios) and any("layer" in key[0] for key in ratios), lines


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
