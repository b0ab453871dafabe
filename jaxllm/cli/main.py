"""The `jaxllm` command: each subcommand prints a short table, or JSON with --json.

Bad input is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxllm.errors import InputError, run_command

Command = Callable[[argparse.Namespace], dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands; nothing heavy is imported until one runs."""
    parser = _Parser(prog="jaxllm", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, summary: str, function: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(function=function)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    sample = add("sample", "Draw images from a trained code model.", "sample")
    sample.add_argument("--run", required=True, metavar="DIR", help="code-model run folder")
    sample.add_argument("--tokenizer", metavar="DIR", help="tokenizer run (default: the codes')")
    sample.add_argument("--class-id", type=int, nargs="+", metavar="K", help="default: all")
    sample.add_argument("--n", type=int, default=8, help="images per class")
    sample.add_argument("--best-of", type=int, default=1, help="candidates per image")
    sample.add_argument("--cfg-scale", type=float, nargs="+", help="guidance, one or per depth")
    sample.add_argument("--cfg-schedule", choices=("constant", "ramp", "interval"))
    sample.add_argument("--cfg-interval", type=float, nargs=2, metavar=("FROM", "TO"))
    sample.add_argument("--temperature", type=float, nargs="+", help="0 = greedy")
    sample.add_argument("--top-k", type=int, nargs="+", help="0 = off")
    sample.add_argument("--top-p", type=float, nargs="+", help="1 = off")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--complete", metavar="IMAGE", help="keep the top rows of this image")
    sample.add_argument("--rows", type=int, default=0, help="grid rows kept by --complete")
    sample.add_argument("--out", required=True, metavar="PNG")

    logprobs = add("logprobs", "Log-probabilities of given codes.", "logprobs")
    logprobs.add_argument("--model", required=True, metavar="DIR", help="code-model run folder")
    logprobs.add_argument("--input", required=True, metavar="JSONL")
    logprobs.add_argument("--output", required=True, metavar="JSONL")

    evaluate = add("eval", "Run a benchmark by name: images.", "evaluate")
    evaluate.add_argument("name", choices=("images",))
    evaluate.add_argument("--real", required=True, metavar="DIR", help="folder of real images")
    evaluate.add_argument("--fake", required=True, metavar="DIR", help="folder of other images")
    features = evaluate.add_mutually_exclusive_group(required=True)
    features.add_argument("--inception", metavar="FILE", help="Inception weights: gives FID")
    features.add_argument("--classifier", metavar="DIR", help="classifier run: gives FD, not FID")
    evaluate.add_argument("--splits", type=int, default=10, help="of the inception score")

    convert = add("convert", "Import an official checkpoint as a run folder.", "convert")
    convert.add_argument("--from", dest="kind", required=True, choices=("dnd", "llamagen"))
    convert.add_argument("source", metavar="SOURCE", help="checkpoint file or its folder")
    convert.add_argument("--to", required=True, metavar="DIR")
    convert.add_argument("--ema", action="store_true", help="take the averaged weights")
    convert.add_argument("--heads", type=int)
    convert.add_argument("--head-layers", type=int, nargs="+", metavar="L", help="0-indexed")
    convert.add_argument("--grid", type=int, nargs=2, default=(16, 16), metavar=("ROWS", "COLS"))

    plot = add("plot", "Plot metrics of run folders.", "plot")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument("--metric", nargs="+", help="names as in metrics.jsonl")
    plot.add_argument("--out", required=True, metavar="FILE")

    bench = add("bench", "Time a system beside what one would use instead: dnd.", "bench")
    bench.add_argument("name", choices=("dnd",))
    bench.add_argument("--repeats", type=int, default=7)
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    bench.add_argument("--threads", type=int, default=2, help="threads of the torch side")
    bench.add_argument("--output", metavar="MD", help="also write the result as a Markdown page")

    data = add("data", "Describe a bundled data set, or verify its files.", "data")
    data.add_argument("name", nargs="?", help="default: list all")
    data.add_argument("--verify", action="store_true", help="check sizes and SHA-256")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return run_command(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from jaxllm import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    from jaxllm.cli import commands
    from jaxllm.cli.show import plain_json, show

    result = getattr(commands, options.function)(options)
    if options.json:
        print(json.dumps(plain_json(result), allow_nan=False))
    else:
        show(result)
    return 0


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
