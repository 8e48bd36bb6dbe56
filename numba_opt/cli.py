"""The command ``numba-opt``: a table of subcommands, each of which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import __version__, arguments

__all__ = ["main"]


class CommandError(Exception):
    """Something that the user can put right, told in one line."""


class Command(NamedTuple):
    """A subcommand."""

    help: str
    examples: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        What follows the command's name; `sys.argv` by default.

    Returns
    -------
    int
        The exit status: 0, 1 after a failure that is told in one line, 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        After ``--help``, ``--version`` or a usage error.
    """
    options = _parser().parse_args(argv)
    try:
        COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        return _fail(options.command, "interrupted", 130)
    except (CommandError, OSError) as error:
        return _fail(options.command, str(error), 1)
    return 0


def _fail(command: str, message: str, status: int) -> int:
    print(f"numba-opt {command}: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="numba-opt",
        description="Optimizer update kernels for Python.",
        epilog=_examples("".join(command.examples for command in COMMANDS.values())),
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"numba_opt {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        command.add_options(
            subparsers.add_parser(
                name,
                help=command.help,
                description=command.help[0].upper() + command.help[1:] + ".",
                epilog=_examples(command.examples),
                formatter_class=plain,
            )
        )
    return parser


def _examples(lines: str) -> str:
    return "examples:\n" + lines.rstrip()


def _positive(text: str) -> int:
    try:
        return arguments.count("the number", int(text), 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}") from None


# ---------------------------------------------------------------- demo


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        choices=("digits", "words", "all"),
        default="all",
        help="digits: a small network with each optimizer; words: embeddings by GroupAdaGrad; default: all",
    )
    parser.add_argument("--out", metavar="DIR", default="demo", help="where to save pictures; default: demo")
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=_positive,
        help="passes over the data; default: 40 for digits, 5 for words",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    try:
        demo.run(options.part, options.out, options.epochs, options.quiet)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("matplotlib", "sklearn", "threadpoolctl", "tqdm"):
            raise
        raise CommandError(f"{package} is missing: pip install numba_opt[demo]") from error


COMMANDS = {
    "demo": Command(
        "train small models on real data with the optimizers, in half a minute",
        "  numba-opt demo                           everything; pictures go to ./demo\n"
        "  numba-opt demo --part digits --out /tmp  the network that reads digits\n"
        "  numba-opt demo --part words --epochs 8   word embeddings, learned for longer\n",
        _demo_options,
        _demo,
    ),
}
