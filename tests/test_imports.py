"""Imports run one way, and importing the package loads no optional library."""

import ast
import json
from pathlib import Path

import pytest
from helpers.processes import run

import hf_actcompress

ROOT = Path(hf_actcompress.__file__).parent
# What a unit (a module or folder beside __init__) may import of this package.  A unit that is not listed is an error,
# so that whoever adds one decides.
MAY = {
    "codecs": set(),
    "layers": {"tracing"},
    "tracing": set(),
    "metering": set(),
    "trials": set(),
    "report": set(),
    "comparison": {"report"},
    "plots": {"report"},
    "webpage": {"report", "comparison", "plots"},
    "config": {"codecs", "budget", "analysis"},
    "packed": {"codecs"},
    "consumers": set(),
    "saved_hooks": set(),
    "sensitivity": {"packed", "trials", "consumers"},
    "budget": {"sensitivity"},
    "sites": {"codecs", "layers", "metering", "config", "packed", "budget", "consumers"},
    "attach": {"codecs", "layers", "metering", "config", "sites", "budget", "analysis", "saved_hooks"},
    "callback": {"codecs", "layers", "metering", "config", "sites", "attach", "trainers", "analysis"},
    "analysis": {"codecs", "layers", "metering", "packed", "sites", "trials"},
    "pipeline": {"codecs", "layers", "metering", "config", "sites", "attach"},
    "weights": {"codecs", "layers", "metering", "config", "trainers", "plots", "recipes"},
    "recipes": {"config", "callback", "codecs", "pipeline", "plots"},
    "trainers": set(),
    "bench": {"codecs", "metering"},
    "study": {"codecs", "layers", "config", "attach", "analysis", "trials", "recipes", "inspection"},
    "inspection": {"codecs", "layers", "config", "sites", "attach", "recipes"},
    "commands": {"codecs", "layers", "metering", "config", "sites", "attach", "report", "plots", "bench", "inspection",
                 "pipeline", "weights", "recipes", "analysis", "study", "comparison", "webpage"},
    "cli": {"commands"},
    "__init__": {"codecs", "layers", "config", "attach", "callback", "sites", "metering"},
}
WITHOUT_TORCH = ("report", "plots", "comparison", "webpage")
TRANSFORMERS = ("callback", "recipes", "weights")
# The command line loads a model by its name; only inside of functions.
TRANSFORMERS_LATE = ("commands", "inspection", "study")
DISTRIBUTED = ("sites/wire.py", "pipeline/")
OPTIONAL = (
    "timm", "matplotlib", "datasets", "evaluate", "sklearn", "torchvision", "transformers", "torch_pruning", "torchao",
    "optuna", "tensorboard", "pandas",
)  # fmt: skip


def imports(path, root=ROOT):
    """(absolute module name, whether it is at the top level) of each import statement of a file; each imported name
    counts too, because `from . import attach` imports a module."""
    package = [root.name, *path.relative_to(root).parent.parts]
    tree = ast.parse(path.read_text())
    late, checking = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            late |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            checking |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield name, id(node) not in late


def unit(path, root=ROOT):
    parts = path.relative_to(root).parts
    return parts[0].removesuffix(".py")


def offences(root=ROOT):
    """Every import of the package that the design does not allow, as text."""
    found = []
    units = {unit(path, root) for path in root.rglob("*.py")}
    for path in sorted(root.rglob("*.py")):
        here, where = unit(path, root), path.relative_to(root).as_posix()
        if here not in MAY:
            found.append(f"{where}: unit {here} is not in the table of this test")
            continue
        for name, top in imports(path, root):
            parts = name.split(".")
            if parts[0] == root.name and len(parts) > 1 and parts[1] in units:
                if parts[1] != here and parts[1] not in MAY[here]:
                    found.append(f"{where} imports {name}")
                inner = path.relative_to(root).parts[1:]
                if here == parts[1] == "sites" and len(parts) > 2 and f"{parts[2]}.py" != inner[0]:
                    if inner[0] != "__init__.py" and (path.parent / f"{parts[2]}.py").is_file():
                        found.append(f"{where} imports the site {name}")
            if parts[0] == "torch" and here in WITHOUT_TORCH:
                found.append(f"{where} imports {name}")
            if parts[0] == "transformers" and here not in TRANSFORMERS and not (here in TRANSFORMERS_LATE and not top):
                found.append(f"{where} imports {name}")
            if name.startswith("torch.distributed") and not where.startswith(DISTRIBUTED):
                found.append(f"{where} imports {name}")
            if top and parts[0] in set(OPTIONAL) - {"transformers"}:
                found.append(f"{where} imports {name} at the top level")
    return sorted(set(found))


def test_the_package_keeps_the_direction():
    assert offences() == []


@pytest.mark.parametrize(("where", "statement", "message"), [
    ("codecs/bad.py", "from ..config import ActCompressConfig", "codecs/bad.py imports hf_actcompress.config"),
    ("codecs/bad.py", "from .. import attach", "codecs/bad.py imports hf_actcompress.attach"),
    ("codecs/bad.py", "def f():\n    import hf_actcompress.sites.boundary", "imports hf_actcompress.sites.boundary"),
    ("layers.py", "from . import metering", "layers.py imports hf_actcompress.metering"),
    ("metering.py", "from .codecs import Codec", "metering.py imports hf_actcompress.codecs"),
    ("config.py", "from .sites import boundary", "config.py imports hf_actcompress.sites"),
    ("attach.py", "from .callback import ActCompressCallback", "attach.py imports hf_actcompress.callback"),
    ("attach.py", "import transformers", "attach.py imports transformers"),
    ("attach.py", "def f():\n    from transformers import Trainer", "attach.py imports transformers"),
    ("cli.py", "import transformers", "cli.py imports transformers"),
    ("attach.py", "from torch import distributed", "attach.py imports torch.distributed"),
    ("sites/boundary.py", "import torch.distributed as dist", "sites/boundary.py imports torch.distributed"),
    ("sites/saved.py", "from .boundary import Boundary", "saved.py imports the site hf_actcompress.sites.boundary"),
    ("sites/saved.py", "from . import boundary", "saved.py imports the site hf_actcompress.sites.boundary"),
    ("report.py", "import torch", "report.py imports torch"),
    ("plots.py", "import matplotlib.pyplot as plt", "plots.py imports matplotlib.pyplot at the top level"),
    ("recipes/data.py", "import datasets", "recipes/data.py imports datasets at the top level"),
    ("novelty.py", "", "unit novelty is not in the table"),
])  # fmt: skip
def test_the_test_sees_an_offence(tmp_path, where, statement, message):
    root = tmp_path / "hf_actcompress"
    units = ("codecs/base", "config", "attach", "callback", "metering", "layers", "cli", "report", "plots",
             "commands/bench", "sites/boundary", "sites/saved", "recipes/data")  # fmt: skip
    for name in units:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").touch()
    allowed = {
        "attach.py": "from .sites.boundary import Boundary\nfrom .layers import x",
        "sites/wire.py": "import torch.distributed",
        "plots.py": "def f():\n    import matplotlib", "callback.py": "import transformers\nfrom . import attach",
        "commands/bench.py": "def f():\n    import transformers", "config.py": "from .codecs import Codec",
    }  # fmt: skip
    for name, text in allowed.items():
        (root / name).write_text(text + "\n")
    assert offences(root) == []
    with open(root / where, "a") as file:
        file.write(statement + "\n")
    assert any(message in offence for offence in offences(root)), offences(root)


PROBE = "import json, sys\n{}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"


def loaded(statement):
    return set(json.loads(run("-c", PROBE.format(statement)).stdout.splitlines()[-1]))


def test_importing_the_package_loads_no_optional_library():
    modules = loaded("import hf_actcompress")
    assert modules & set(OPTIONAL) == set()
    assert "torch" in modules


def test_the_probe_sees_what_is_loaded():
    """The callback needs transformers, and the package hands it out without loading it before."""
    assert "transformers" in loaded("import hf_actcompress; hf_actcompress.ActCompressCallback")


def test_recipes_load_nothing_optional_either():
    assert loaded("import hf_actcompress.recipes, hf_actcompress.recipes.run") & set(OPTIONAL) == set()


def test_every_public_name_exists():
    for name in hf_actcompress.__all__:
        assert getattr(hf_actcompress, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        hf_actcompress.nonsense  # noqa: B018
