"""Two data sets that need neither network nor files, so that scripts and tests run anywhere.

`digits` are scikit-learn's handwritten digits as small RGB images. `docstrings` is a text task made at run time
from the English of libraries that are installed already. Both return a `datasets.DatasetDict` in memory and leave
nothing on disk. This module knows no model and no Trainer.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

SEED = 0
DIGITS_TEST = 360
# The first four are dependencies of the example scripts, so that everyone gets the same task; the others replace
# those that are missing.
LIBRARIES = ("numpy", "torch", "pandas", "sklearn", "matplotlib", "transformers")
MAX_CLASSES = 4
TRAIN_PER_CLASS, VALIDATION_PER_CLASS = 800, 150
# Parsing costs about a second a megabyte of source.
MAX_SOURCE_BYTES = 2_500_000
MASK = "library"

_SKIP_FOLDERS = {"tests", "test", "testing", "__pycache__", "_vendor", "externals", "mpl-data"}
_NAMES = re.compile(
    r"\b(?:numpy|np|numpydoc|ndarrays?|pytorch|torch\w*|aten|caffe2?|pandas|pd|dataframes?|scikits?[- ]learn|scikits?|"
    r"sklearn|matplotlib|mpl|pyplot|plt|pylab|transformers|hugging ?face)\b",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:+-]+:`~?([^`]*)`")
_NOT_PROSE = re.compile(r">>>|\.\.\.|::|[=\\|{}<>\[\]@#*_~^$%]|https?:|--| : ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def digits(image_size: int = 32) -> datasets.DatasetDict:
    """Scikit-learn's 1797 handwritten digits (8x8, 16 grey levels), enlarged to RGB images.

    Columns `img` (Image, `image_size` squared) and `label` (ClassLabel, "0" to "9"). The split is fixed and
    stratified: 1437 train, 360 test. A mirrored digit is no digit: do not flip these images.

    Raises:
        ValueError: if `image_size` is below 8.
    """
    if image_size < 8:
        raise ValueError(f"digits() got image_size={image_size}; the images have 8x8 pixels: use 8 or more.")
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    grey = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(grey)), test_size=DIGITS_TEST, stratify=raw.target, random_state=SEED)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )

    def build(rows: np.ndarray) -> datasets.Dataset:
        images = [
            Image.fromarray(grey[i]).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
            for i in rows
        ]
        return datasets.Dataset.from_dict({"img": images, "label": raw.target[rows].tolist()}, features=features)

    return datasets.DatasetDict({"train": build(train), "test": build(test)})


def docstrings() -> datasets.DatasetDict:
    """Which library does a sentence come from? Documentation sentences of up to four installed libraries.

    The sentences come from docstrings that are read with `ast` (nothing is imported): numpy, torch, pandas and
    scikit-learn, with matplotlib and transformers as stand-ins. Prose only (30 to 200 characters, no code, tables
    or doctests), each sentence once, none that two libraries share. Names that give the answer away (the library
    itself, `np.`, `torch.`, ndarray, DataFrame) are replaced by "library". Balanced: 800 train and 150 validation
    sentences a library; chance is one in the number of libraries. The same installed versions give the same data
    set; other versions give other sentences, so figures made on it compare runs on one machine and nothing else.

    Columns `sentence`, `label` (ClassLabel, the libraries' names), `idx`.

    Raises:
        ValueError: if fewer than two libraries have enough sentences.
    """
    import datasets

    wanted = TRAIN_PER_CLASS + VALIDATION_PER_CLASS
    pools: dict[str, Sequence[str]] = {}
    found: dict[str, int] = {}
    for library in LIBRARIES:
        sentences = _library_sentences(library)
        found[library] = len(sentences)
        if len(sentences) >= wanted:
            pools[library] = sentences
        if len(pools) == MAX_CLASSES:
            break
    owner: dict[str, set[str]] = {}
    for library, sentences in pools.items():
        for sentence in sentences:
            owner.setdefault(_key(sentence), set()).add(library)
    pools = {name: [s for s in pool if len(owner[_key(s)]) == 1] for name, pool in pools.items()}
    pools = {name: pool for name, pool in pools.items() if len(pool) >= wanted}
    if len(pools) < 2:
        raise ValueError(
            f"docstrings() found these numbers of sentences: {found}; it needs {wanted} in each of at least two "
            "libraries. Install scikit-learn and pandas with their sources, or name a local data set."
        )

    rows: dict[str, list[tuple[str, int]]] = {"train": [], "validation": []}
    for label, pool in enumerate(pools.values()):
        random.Random(SEED).shuffle(pool)
        rows["train"] += [(s, label) for s in pool[:TRAIN_PER_CLASS]]
        rows["validation"] += [(s, label) for s in pool[TRAIN_PER_CLASS:wanted]]
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(pools)),
            "idx": datasets.Value("int32"),
        }
    )
    splits = {}
    for split, pairs in rows.items():
        random.Random(SEED).shuffle(pairs)
        columns = {"sentence": [s for s, _ in pairs], "label": [y for _, y in pairs], "idx": list(range(len(pairs)))}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


@functools.cache  # some seconds for all libraries
def _library_sentences(library: str) -> tuple[str, ...]:
    """The clean sentences of one library, each once, in an order that only its files decide."""
    seen: dict[str, str] = {}
    read = 0
    for path in _source_files(library):
        source = path.read_text(encoding="utf-8", errors="ignore")
        read += len(source)
        if read > MAX_SOURCE_BYTES:
            break
        for text in _documentation(source):
            for sentence in clean_sentences(text):
                seen.setdefault(_key(sentence), sentence)
    return tuple(seen.values())


def _source_files(library: str) -> list[Path]:
    """Python files of an installed library without tests, shuffled once so that a prefix covers all of it."""
    try:
        spec = importlib.util.find_spec(library)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for folder, names, leaves in os.walk(root):
        names[:] = sorted(name for name in names if name not in _SKIP_FOLDERS)
        files += [Path(folder, leaf) for leaf in leaves if leaf.endswith(".py")]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    random.Random(SEED).shuffle(files)
    return files


def _documentation(source: str) -> Iterator[str]:
    """Docstrings of a module, and the texts that `add_newdoc` and `add_docstr` give to compiled functions."""
    if '"""' not in source:
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
        elif isinstance(node, ast.Call) and _called(node).endswith(("newdoc", "docstr")):
            for leaf in ast.walk(node):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) and "\n" in leaf.value:
                    yield leaf.value


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def clean_sentences(text: str) -> list[str]:
    """The prose sentences of a docstring, with the libraries' names masked.

    A sentence counts as prose when it runs from a capital letter to a full stop, has at least five words, is nine
    tenths letters and carries no mark of code, tables or lists. Inline roles and backquotes are unwrapped first.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        flat = _ROLE.sub(r"\1", flat).replace("`", "")
        for sentence in _SENTENCE_END.split(flat):
            if not (30 <= len(sentence) <= 200 and sentence[0].isupper() and sentence.endswith(".")):
                continue
            if not sentence.isascii() or _NOT_PROSE.search(sentence) or sentence.count(" ") < 4:
                continue
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if letters < 0.9 * len(sentence):
                continue
            masked = _NAMES.sub(MASK, sentence)
            sentences.append(masked[0].upper() + masked[1:])
    return sentences


def _key(sentence: str) -> str:
    """What makes two sentences the same: their letters, whatever the case, digits and punctuation."""
    return re.sub(r"[^a-z]+", " ", sentence.lower()).strip()
