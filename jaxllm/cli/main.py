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

    generate = add("generate", "Complete text with a language model.", "generate")
    generate.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face folder or run"
    )
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT")
    given.add_argument("--prompts", metavar="JSONL", help="prompt, messages or prompt_ids a line")
    generate.add_argument("--output", metavar="JSONL", help="default: print")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=1.0, help="0 = greedy")
    generate.add_argument("--top-k", type=int, default=0, help="0 = off")
    generate.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    generate.add_argument("--min-p", type=float, default=0.0, help="0 = off")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="1 = off")
    generate.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="stop strings")
    generate.add_argument("--stop-id", type=int, nargs="+", default=[], metavar="ID")
    generate.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    generate.add_argument("--samples", type=int, default=1, help="completions per prompt")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--batch", type=int, default=8, help="prompts run together")
    generate.add_argument("--prefill-chunk", type=int, metavar="T", help="prompt tokens at a time")
    generate.add_argument("--kv", default="full", metavar="SPEC", help="cache plan, say headkv:...")
    generate.add_argument("--stream", action="store_true", help="show text as it comes")

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

    logprobs = add("logprobs", "Log-probabilities of given completions or codes.", "logprobs")
    logprobs.add_argument(
        "--model", required=True, metavar="DIR", help="language model or code-model run"
    )
    logprobs.add_argument("--batch", type=int, default=8, help="texts scored together")
    logprobs.add_argument("--input", required=True, metavar="JSONL")
    logprobs.add_argument("--output", required=True, metavar="JSONL")

    evaluate = commands.add_parser("eval", help="Run a benchmark by name.")
    evaluate.set_defaults(function="evaluate")
    evaluations = evaluate.add_subparsers(
        dest="name", metavar="NAME", required=True, parser_class=_Parser
    )
    _add_evaluations(evaluations)

    convert = add("convert", "Import a checkpoint as a run, or export a language model.", "convert")
    convert.add_argument("--from", dest="kind", choices=("dnd", "llamagen", "hf"))
    convert.add_argument("source", metavar="SOURCE", help="checkpoint file, its folder, or a run")
    convert.add_argument(
        "--to", required=True, nargs="+", metavar="DIR", help="a run folder; hf DIR: transformers'"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of hf files")
    convert.add_argument("--ema", action="store_true", help="take the averaged weights")
    convert.add_argument("--heads", type=int)
    convert.add_argument("--head-layers", type=int, nargs="+", metavar="L", help="0-indexed")
    convert.add_argument(
        "--grid", type=int, nargs=2, metavar=("ROWS", "COLS"), help="of codes (default: 16 16)"
    )

    heads = add("heads", "Measure how much each attention head retrieves (HeadKV).", "heads")
    heads.add_argument("--model", required=True, metavar="DIR")
    heads.add_argument("--estimator", choices=("r", "er", "r2"), default="r2")
    heads.add_argument("--gate", choices=("argmax", "generate", "none"), default="argmax")
    heads.add_argument("--lengths", type=int, nargs="+", default=[1024], metavar="T")
    heads.add_argument("--depths", type=float, nargs="+", default=[0, 25, 50, 75, 100])
    heads.add_argument("--needles", type=int, default=3)
    heads.add_argument("--margin", type=int, default=200, help="tokens left to the needle")
    heads.add_argument("--text", metavar="FILE", help="haystack (default: Shakespeare)")
    heads.add_argument("--seed", type=int, default=0)
    heads.add_argument("--batch", type=int, default=4)
    heads.add_argument("--output", required=True, metavar="JSON", help="scores, for --kv headkv:")

    plan = add("plan", "Memory, time and collectives of a config on a topology.", "plan")
    plan.add_argument("config", metavar="CONFIG", help="then --dotted.key VALUE as in training")
    plan.add_argument("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p-64, cpu:8")
    plan.add_argument("--search", action="store_true", help="compile with every knob turned")
    plan.add_argument("--decode", type=int, metavar="T", help="plan a decode step with T held")
    plan.add_argument("--rows", type=int, default=1, metavar="B", help="of the decode step")
    plan.add_argument("--kv", default="full", metavar="SPEC", help="cache plan of the decode step")
    plan.add_argument("--picture", metavar="PNG")
    plan.add_argument("--render", metavar="DIR", help="only write files that launch the run")

    plot = add("plot", "Plot metrics of run folders.", "plot")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument("--metric", nargs="+", help="names as in metrics.jsonl")
    plot.add_argument("--out", required=True, metavar="FILE")

    bench = add("bench", "Time a system beside what one would use instead.", "bench")
    benches = ("dnd", "decode", "train", "headkv", "preference", "gpu")
    bench.add_argument("name", choices=benches)
    bench.add_argument("--repeats", type=int, default=7)
    bench.add_argument("--batch", type=int, nargs="+", help="default: the benchmark's")
    bench.add_argument("--threads", type=int, default=2, help="threads of the torch side")
    bench.add_argument("--output", metavar="MD", help="also write it, as a section of a page")
    parts = ("dnd", "llama", "decode")
    bench.add_argument("--parts", nargs="+", choices=parts, help="of gpu: only these")
    bench.add_argument("--peak-tflops", type=float, help="of gpu: dense bfloat16, unknown cards")
    bench.add_argument("--bandwidth", type=float, metavar="TB/S", help="of gpu: of its memory")

    data = add("data", "Describe a bundled data set, or verify its files.", "data")
    data.add_argument("name", nargs="?", help="default: list all")
    data.add_argument("--verify", action="store_true", help="check sizes and SHA-256")
    return parser


def _add_evaluations(evaluations: Any) -> None:
    """Adds the parsers of `jaxllm eval NAME`."""

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        parser = evaluations.add_parser(name, help=summary, description=summary)
        parser.set_defaults(function="evaluate")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        return parser

    images = add("images", "Compare two folders of images.")
    images.add_argument("--real", required=True, metavar="DIR", help="folder of real images")
    images.add_argument("--fake", required=True, metavar="DIR", help="folder of other images")
    features = images.add_mutually_exclusive_group(required=True)
    features.add_argument("--inception", metavar="FILE", help="Inception weights: gives FID")
    features.add_argument("--classifier", metavar="DIR", help="classifier run: gives FD, not FID")
    images.add_argument("--splits", type=int, default=10, help="of the inception score")

    haystack = add("haystack", "Needles in long texts under cache plans.")
    haystack.add_argument("--kind", choices=("needle", "reasoning"), default="needle")
    haystack.add_argument("--lengths", type=int, nargs="+", default=[1024], metavar="T")
    haystack.add_argument("--depths", type=float, nargs="+", default=[0, 25, 50, 75, 100])
    haystack.add_argument("--needles", type=int, default=3, help="different needles")
    haystack.add_argument("--metric", choices=("f1", "exact", "rouge"), default="f1")
    haystack.add_argument("--margin", type=int, default=200, help="tokens left to the needle")
    haystack.add_argument("--text", metavar="FILE", help="haystack (default: Shakespeare)")
    babilong = add("babilong", "bAbI questions in long texts under cache plans.")
    longbench = add("longbench", "LongBench or LooGLE files under cache plans.")
    for parser in (babilong, longbench):
        parser.add_argument("--input", required=True, nargs="+", metavar="JSONL")
        parser.add_argument("--limit", type=int, help="records of each file")
        parser.add_argument("--max-prompt", type=int, help="cut the middle of longer prompts")
    for parser in (haystack, babilong, longbench):
        parser.add_argument("--model", required=True, metavar="DIR")
        parser.add_argument("--kv", nargs="+", default=["full"], metavar="SPEC", help="cache plans")
        parser.add_argument("--protocol", default="aware", help="aware, agnostic or multi_turn")
        parser.add_argument("--batch", type=int, default=4, help="contexts run together")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--max-new-tokens", type=int, help="default: the benchmark's")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return run_command(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
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
