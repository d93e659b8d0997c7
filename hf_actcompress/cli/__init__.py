"""`hf-actcompress`: look at models, codecs, links and results before and after training.

Each subcommand is a file in this folder.  `--help` and `--version` import no torch: a file imports what it runs with
inside the function that runs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .common import Help

COMMANDS = ("inspect", "bench", "analyze", "advise", "fit", "card", "report")
EXAMPLES = """examples:
  hf-actcompress inspect minilm --first 1 --last 2 --placement cuts
  hf-actcompress inspect mobilenetv2_100 --batch-size 64 --image-size 96 --codec block:bits=4 topk:ratio=0.2
  hf-actcompress analyze minilm embedded --codec block:bits=4 block:bits=2 --out outputs/minilm
  hf-actcompress bench block:bits=4 sort:bits=8 --shape 32x128x384
  hf-actcompress fit llama --config hidden_size=2048 num_hidden_layers=16 --seq-len 1024 --dtype bf16 --memory 24GB
  hf-actcompress advise --model minilm --bandwidth 100mbit
  hf-actcompress report outputs --html report.html

exit codes: 0 done, 2 wrong option or input (one line on stderr says which), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.  Returns the exit code: 0, 2 after a ValueError, 130 after Ctrl-C."""
    parser, commands = _parsers()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
        sys.stdout.flush()
    except ValueError as error:
        message = _as_typed(str(error), commands[args.command])
        print(f"hf-actcompress {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-actcompress {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-actcompress ... | head`; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich does, which catches it where it prints
    except OSError as error:  # a folder that may not be written, a full disk
        if error.filename is None:
            raise
        print(f"hf-actcompress {args.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="hf-actcompress", description="Compress the tensors that training stores and sends.", epilog=EXAMPLES,
        formatter_class=Help,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf_actcompress {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        import_module(f".{name}", __package__).add_parser(commands)
    return parser, commands.choices


def _as_typed(message: str, parser: argparse.ArgumentParser) -> str:
    """The message with Python's spelling of options (`batch_size=3`, `layers['x']`) replaced by the command line's."""
    for action in parser._actions:
        if action.option_strings:
            option, before = action.option_strings[-1], r"(?<![\w:,.'\"-])"
            message = re.sub(rf"{before}{action.dest}(=|(?=\[))", lambda m, o=option: o + " " * bool(m[1]), message)
    return message
