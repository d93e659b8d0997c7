"""benchmarks/slow_link.sh refuses where it cannot work, and where it can it measures what it says."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.processes import ROOT, environment

SCRIPT = ROOT / "benchmarks" / "slow_link.sh"


def start(*options, path=os.environ["PATH"], timeout=280):
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *map(str, options)], env=environment(PATH=path, PYTHON=sys.executable),
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture
def tools(tmp_path):
    """A PATH with stand-ins, which come first."""

    def put(**scripts):
        for name, text in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return put


def test_without_root_it_says_so(tools):
    found = start(path=f"{tools(id='echo 1000')}:{os.environ['PATH']}")
    assert found.returncode == 3 and found.stdout == ""
    assert found.stderr == "slow_link.sh: network namespaces need root: run it with sudo.\n"


def test_without_the_tools_it_says_so(tools):
    folder = tools(id="echo 0")
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    found = start(path=str(folder))
    assert found.returncode == 3 and "'ip' is missing: install iproute2" in found.stderr


def test_without_namespaces_it_says_so(tools):
    folder = tools(id="echo 0", ip="exit 1", tc="exit 1", taskset="exit 1")
    found = start("--models", "tiny", path=f"{folder}:{os.environ['PATH']}")
    assert found.returncode == 3 and "does not let root make network namespaces" in found.stderr


def namespaces():
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc", "taskset"))):
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


def listed():
    return set(subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines())


@pytest.mark.skipif(not namespaces(), reason="needs root, iproute2 and network namespaces")
def test_a_tiny_row_is_measured_and_kept(tmp_path):
    path = tmp_path / "slow_link.json"
    options = ("--models", "tiny", "--rates", 100, "--steps", 1, "--output", path)
    options += ("--codecs", "torch", "none", "block 4/8")
    before = listed()
    found = start(*options)
    assert found.returncode == 0, found.stderr[-3000:]
    row = json.loads(path.read_text())["rows"]["tiny@100"]
    plain, none, block = (row["codecs"][label] for label in ("torch", "none", "block 4/8"))
    assert plain["loss"] == none["loss"] != block["loss"]
    for one in (none, block):
        for way, rank in (("forward", 0), ("backward", 1)):
            payload, beside = one[f"bytes_{way}"][rank], 512 * (row["chunks"] + 4)  # packets of gloo, and the barriers
            assert payload < one[f"wire_{way}"][rank] < payload + beside
    assert listed() <= before


def test_rows_that_are_there_are_not_measured_again(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("slow_link")
    path = tmp_path / "slow_link.json"
    path.write_text(json.dumps({"rows": {"minilm@100": {}}}))

    def rows(*options):
        monkeypatch.setattr(sys, "argv", ["slow_link.py", "rows", "--output", str(path), *options])
        script.main()
        return capsys.readouterr().out.split()

    assert rows("--models", "minilm") == ["minilm@10", "minilm@1000"]
    assert rows("--models", "minilm", "--rates", "100", "--again") == ["minilm@100"]
    assert rows("--models", "minilm", "--rates", "100", "--stages", "3") == ["minilm-3stages@100"]
