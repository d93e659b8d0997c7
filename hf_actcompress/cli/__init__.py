"""`hf-actcompress`: look at models, codecs, links and results before and after training.

Each subcommand is a file of this folder; this file only lists them and turns a ValueError into a line of text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS = ("inspect", "bench", "analyze", "advise", "card", "report")
EXAMPLES = """examples:
  hf-actcompress inspect minilm --first 1 --last 2 --placement cuts
  hf-actcompress inspect mobilenetv2_100 --batch-size 64 --image-size 96 --codec block:bits=4 topk:ratio=0.2
  hf-actcompress analyze minilm cola --codec block:bits=4 block:bits=2 --out outputs/minilm
  hf-actcompress bench block:bits=4 sort:bits=8 --shape 32x128x384
  hf-actcompress advise --model minilm --bandwidth 100mbit
  hf-actcompress report outputs --html report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.  Returns the exit code: 0, or 2 after a ValueError, whose text goes to stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
    except ValueError as error:
        print(f"hf-actcompress {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-actcompress", description="Compress what training keeps and moves.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf_actcompress {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        import_module(f".{name}", __package__).add_parser(commands)
    return parser
