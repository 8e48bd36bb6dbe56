"""The command ``numba-opt``: a table of subcommands, each of which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..core import arguments

__all__ = ["main"]


class CommandError(Exception):
    """Something that the user can put right, told in one line."""


class UsageError(CommandError):
    """An argument that does not do."""


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
        The exit status: 0; 2 after a mistake in the arguments and 1 after any other failure, told in one
        line; 130 after Ctrl-C.

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
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(options.command, str(error), 2)
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


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def _show(options: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values, indent=2) if options.json else text, flush=True)


# ---------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> None:
    from . import info

    found = info.collect()
    _show(options, found, info.text(found))


# ---------------------------------------------------------------- warmup


def _warmup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("optimizers", metavar="OPTIMIZER", nargs="*", help="by name; default: all of them")
    parser.add_argument(
        "--dtypes",
        metavar="DTYPE",
        nargs="+",
        default=["float32"],
        help="float32, float64, float16, bfloat16; default: float32",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu (default), cuda, cuda:0, or a compute capability such as sm_90",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module, or a file of Python, that registers optimizers; may be given more than once",
    )
    parser.add_argument("--dense", action="store_true", help="leave out what sparse gradients need")
    parser.add_argument("--clear", action="store_true", help="empty the cache, and do nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_json(parser)


def _warmup(options: argparse.Namespace) -> None:
    if options.clear:
        if options.optimizers:
            raise UsageError("--clear empties the whole cache and takes no optimizers")
        from . import info

        removed, folder = info.clear_cache(), info.cache_usage()["folder"]
        _show(options, {"removed": removed, "folder": folder}, f"{removed} kernels removed from {folder}")
        return
    from ..errors import CudaUnavailableError
    from .warmup import warmup

    for module in options.modules:
        _import(module)
    names = options.optimizers or None
    try:
        found = warmup(names, options.dtypes, options.device, not options.dense, not options.quiet)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except CudaUnavailableError as error:
        raise CommandError(str(error)) from error
    _show(options, found._asdict(), str(found))


def _import(module: str) -> None:
    """Import a module by its name, which may be in the current folder, or a file of Python."""
    path = Path(module)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, "")
            importlib.import_module(module)
            return
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    except Exception as error:
        raise UsageError(f"--import {module}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- bench


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--elements", metavar="N", type=_positive, default=10_000_000, help="default: 10,000,000"
    )
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="save a picture; needs matplotlib")
    _add_json(parser)


def _bench(options: argparse.Namespace) -> None:
    from . import bench

    if options.plot is not None:
        _check_picture(options.plot)
    try:
        found = bench.collect(options.elements)
    except MemoryError as error:
        raise UsageError(f"--elements {options.elements:,} needs more memory than there is") from error
    _show(options, found, bench.text(found))
    if options.plot is not None:
        bench.plot(found, options.plot)


def _check_picture(path: Path) -> None:
    """Refuse a picture that could not be saved at the end, before the work begins."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CommandError("matplotlib is missing: pip install numba_opt[demo]") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise UsageError(f"--plot {path}: the name must end in one of {', '.join(f'.{k}' for k in known)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")


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
    from .. import demo

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
    "info": Command(
        "show versions, processor features, threads, devices and the cache",
        "  numba-opt info                           for people\n"
        "  numba-opt info --json                    for machines\n",
        _add_json,
        _info,
    ),
    "warmup": Command(
        "compile beforehand what a program will need, such as in a container build",
        "  numba-opt warmup                         all optimizers in float32\n"
        "  numba-opt warmup nag ftml --dtypes float32 float64\n"
        "  numba-opt warmup --dense                 without sparse gradients\n"
        "  numba-opt warmup --clear                 empty the cache\n",
        _warmup_options,
        _warmup,
    ),
    "bench": Command(
        "measure how close to the speed of memory the optimizers come on this machine",
        "  numba-opt bench                          a table\n"
        "  numba-opt bench --plot bench.png         and a picture\n"
        "  numba-opt bench --elements 100000 --json\n",
        _bench_options,
        _bench,
    ),
}
