"""Imports run one way: no circle, no arrow upwards, and `import hf_actcompress` loads no torch.

Every import statement counts, those under TYPE_CHECKING and inside functions too.
"""

import ast
import json
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.processes import run

import hf_actcompress

ROOT = Path(hf_actcompress.__file__).parent
# Lowest first.  A unit (a folder, or a module beside __init__) may import the units of its own line and of the lines
# above it.  A unit that is in no line is an offence, so that whoever adds one decides where it belongs.
ORDER = [
    ["ops"],
    ["codecs"],
    ["models"],
    ["observe"],
    ["boundary"],
    ["saved", "reduce"],
    ["config", "attach"],
    ["callback", "pipeline", "weights"],
    ["plan"],
    ["workloads"],
    ["cli"],
    ["__init__", "__main__"],
]
# Tables, figures and the page read records: they import nothing of ours, and every unit above codecs may import them.
REPORT = "report"
NEVER = {("saved", "boundary"), ("workloads", "plan")}  # on top of ORDER
LOOSE = {"__init__", "__main__", "config", "attach", "callback"}  # the only modules beside __init__
# Library: (units that may import it anywhere, units or files that may import it inside functions).
LIBRARIES = {
    "torch": ({"ops", "codecs", "models", "observe", "boundary", "saved", "reduce", "config", "attach", "callback",
               "pipeline", "weights", "plan", "workloads"}, {"cli", "__init__"}),
    "torch.distributed": ({"pipeline", "reduce"}, {"workloads/pipelined.py", "boundary/shards.py"}),
    "transformers": ({"callback", "weights", "workloads"}, {"cli", "plan"}),
}  # fmt: skip
# Libraries of an extra: imported inside functions only.
OPTIONAL = {
    "timm", "matplotlib", "datasets", "evaluate", "sklearn", "torchvision", "torch_pruning", "torchao", "optuna",
    "tensorboard", "pandas",
}  # fmt: skip


def imports(path, root=ROOT):
    """(module or name in it, whether it is imported at the top level, TYPE_CHECKING excluded) of every import."""
    package = [root.name, *path.relative_to(root).parent.parts]
    tree = ast.parse(path.read_text())
    late = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            late |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in late) for name in names)


def module_file(name, root):
    """The file of the package that holds `name`: a module, a folder's __init__, or the nearest parent of a name."""
    parts = name.split(".")[1:]
    while True:
        stem = root.joinpath(*parts)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
        parts.pop()


def unit(path, root=ROOT):
    return path.relative_to(root).parts[0].removesuffix(".py")


def circles(graph):
    """The arrows (file, imported file) from which one comes back to the file."""
    reached = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for target in graph.get(ahead.pop(), set()) - seen:
                seen.add(target)
                ahead.append(target)
        reached[start] = seen
    return [(a, b) for a in graph for b in graph[a] if a in reached.get(b, ())]


def offences(root=ROOT):
    """Every import that is not allowed, and every file in the wrong place, as text."""
    rank = {name: line for line, names in enumerate(ORDER) for name in names}
    found, graph = [], defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        here, where = unit(path, root), path.relative_to(root).as_posix()
        if path.parent == root and here not in LOOSE:
            found.append(f"{where} is a loose module: put it into a folder")
        elif here not in rank and here != REPORT:
            found.append(f"{where}: {here} is not in ORDER")
        for name, top in imports(path, root):
            first = name.split(".")[0]
            if first == root.name:
                target = module_file(name, root)
                if target == root / "__init__.py" and here not in ("__init__", "__main__"):
                    if name != f"{root.name}.__version__":
                        found.append(f"{where} imports {name} from the package: import it from where it is defined")
                    continue
                there, to = unit(target, root), target.relative_to(root).as_posix()
                if target != path:
                    graph[where].add(to)
                if here == there:
                    continue
                if there == REPORT:
                    wrong = here in ("ops", "codecs")
                else:
                    wrong = here == REPORT or rank.get(here, -1) < rank.get(there, 99) or (here, there) in NEVER
                if wrong:
                    found.append(f"{where} imports {to}")
            for library, (anywhere, in_functions) in LIBRARIES.items():
                if f"{name}.".startswith(f"{library}.") and not {here, where} & anywhere:
                    if top or not {here, where} & in_functions:
                        found.append(f"{where} imports {name}")
            if top and first in OPTIONAL:
                found.append(f"{where} imports {name} at the top level")
    found += [f"circle: {a} -> {b}" for a, b in circles(graph)]
    return sorted(set(found))


def test_imports_run_one_way():
    assert offences() == []


@pytest.mark.parametrize(("where", "statement", "message"), [
    ("codecs/bad.py", "from ..config import ActCompressConfig", "codecs/bad.py imports config.py"),
    ("codecs/bad.py", "from .. import attach", "codecs/bad.py imports attach.py"),
    ("codecs/bad.py", "def f():\n    import hf_actcompress.boundary.channel", "bad.py imports boundary/channel.py"),
    ("codecs/bad.py", "if TYPE_CHECKING:\n    from ..attach import Handle", "codecs/bad.py imports attach.py"),
    ("codecs/bad.py", "from ..report import tables", "codecs/bad.py imports report/tables.py"),
    ("codecs/bad.py", "from .. import Codec", "imports hf_actcompress.Codec from the package"),
    ("codecs/bad.py", "from .base import Codec\nclass A:\n    from . import a", "circle: codecs/bad.py -> codecs/a"),
    ("codecs/base.py", "def f():\n    from .a import A", "circle: codecs/a.py -> codecs/base.py"),
    ("codecs/base.py", "if TYPE_CHECKING:\n    from .a import A", "circle: codecs/base.py -> codecs/a.py"),
    ("ops/x.py", "from ..codecs.base import Codec", "ops/x.py imports codecs/base.py"),
    ("models/x.py", "from ..observe.meter import Meter", "models/x.py imports observe/meter.py"),
    ("saved/x.py", "from ..boundary import channel", "saved/x.py imports boundary/channel.py"),
    ("weights/x.py", "from ..workloads import data", "weights/x.py imports workloads/data.py"),
    ("plan/x.py", "def f():\n    from ..workloads import data", "plan/x.py imports workloads/data.py"),
    ("attach.py", "from .callback import ActCompressCallback", "attach.py imports callback.py"),
    ("report/tables.py", "from ..codecs.base import Codec", "report/tables.py imports codecs/base.py"),
    ("report/tables.py", "def f():\n    import torch", "report/tables.py imports torch"),
    ("cli/bench.py", "from torch import Tensor", "cli/bench.py imports torch.Tensor"),
    ("attach.py", "import transformers", "attach.py imports transformers"),
    ("attach.py", "def f():\n    from transformers import Trainer", "attach.py imports transformers.Trainer"),
    ("cli/bench.py", "import transformers", "cli/bench.py imports transformers"),
    ("attach.py", "from torch import distributed", "attach.py imports torch.distributed"),
    ("boundary/channel.py", "import torch.distributed as dist", "boundary/channel.py imports torch.distributed"),
    ("report/plots.py", "import matplotlib.pyplot as plt", "imports matplotlib.pyplot at the top level"),
    ("workloads/data.py", "import datasets", "workloads/data.py imports datasets at the top level"),
    ("novelty.py", "", "novelty.py is a loose module"),
    ("novelty/x.py", "", "novelty/x.py: novelty is not in ORDER"),
])  # fmt: skip
def test_a_planted_offence_is_found(tmp_path, where, statement, message):
    root = tmp_path / "hf_actcompress"
    package = {
        "__init__.py": "if TYPE_CHECKING:\n    from .attach import Handle",
        "codecs/base.py": "import torch", "codecs/a.py": "from .base import Codec\nfrom . import bad",
        "codecs/bad.py": "", "observe/meter.py": "from ..models import layers\nfrom ..report import tables",
        "models/layers.py": "", "boundary/channel.py": "from ..observe.meter import Meter", "config.py": "",
        "attach.py": "from .boundary.channel import Channel\nfrom .config import ActCompressConfig",
        "callback.py": "import transformers\nfrom . import attach", "pipeline/wire.py": "import torch.distributed",
        "report/tables.py": "", "report/plots.py": "def f():\n    import matplotlib\nfrom . import tables",
        "workloads/data.py": "def f():\n    import datasets",
        "cli/bench.py": "from .. import __version__, attach\ndef f():\n    import torch, transformers",
    }  # fmt: skip
    for name, text in package.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert offences(root) == []
    (root / where).parent.mkdir(exist_ok=True)
    with open(root / where, "a") as file:
        file.write(statement + "\n")
    assert any(message in offence for offence in offences(root)), offences(root)


STEPS = [
    "import hf_actcompress",
    "import hf_actcompress.cli",
    "try: hf_actcompress.cli.main(['--help'])\nexcept SystemExit: pass",
    "hf_actcompress.compress_model",
    "import hf_actcompress.workloads, hf_actcompress.workloads.run",
    "hf_actcompress.ActCompressCallback",
]
PROBE = """
import json, sys
after = []
for step in {!r}:
    exec(step)
    after.append(sorted({{name.split(".")[0] for name in sys.modules}}))
print(json.dumps(after))
"""


def test_libraries_are_loaded_only_when_a_name_needs_them():
    """One process takes the steps in turn.  The last one shows that the probe sees what is loaded."""
    after = json.loads(run("-c", PROBE.format(STEPS)).stdout.splitlines()[-1])
    package, cli, shown, attached, workloads, callback = map(set, after)
    assert "torch" not in package | cli | shown
    assert "transformers" not in attached | workloads
    assert not (attached | workloads) & OPTIONAL
    assert "torch" in attached and "transformers" in callback


def test_the_three_lists_of_public_names_agree():
    """TYPE_CHECKING imports for type checkers, _HOMES for __getattr__, __all__ for readers: the same names."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == hf_actcompress._HOMES
    assert hf_actcompress.__all__ == sorted(hf_actcompress._HOMES)
    for name in hf_actcompress.__all__:
        assert getattr(hf_actcompress, name) is not None
        assert name in dir(hf_actcompress)
    with pytest.raises(AttributeError, match="nonsense"):
        hf_actcompress.nonsense  # noqa: B018
