"""Starts a run on Cloud TPU and, when spot machines are taken away, starts it again.

python train/launch/tpu.py CONFIG --topology v5e:4x4 --zone Z --project P --bucket B
    --repository URL [--run]
    [--on-demand] [--attempts N] [--dotted.key value ...]

Prints the gcloud commands; with --run it runs them. Each attempt asks for the machines, waits until
they are there, installs, mounts the bucket and trains; the same command resumes from the bucket.
"""

import argparse
import subprocess
import sys
import time

from jaxllm.cli.plan_command import launch_of
from jaxllm.errors import InputError, run_command
from jaxllm.planning.launch import gcloud, shell_words

POLL_SECONDS = 30
NAMES = ("zone", "project", "bucket", "repository")
GONE = ("FAILED", "SUSPENDED", "")


def main() -> int:
    """Parses the command line and makes the attempts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    for name in ("topology", *NAMES):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--run", action="store_true", help="run the commands")
    parser.add_argument("--on-demand", action="store_true", help="machines that stay")
    parser.add_argument("--attempts", type=int, default=100)
    options, overrides = parser.parse_known_args()
    run = launch_of(options.config, overrides, options.topology, spot=not options.on_demand)
    names = {name.upper(): getattr(options, name) for name in NAMES}
    commands = dict(gcloud(run))
    if not options.run:
        for what, words in commands.items():
            print(f"# {what}\n{filled(words, names)}")
        return 0
    for attempt in range(options.attempts):
        print(f"attempt {attempt + 1} of {options.attempts}", flush=True)
        if attempt_run(commands, names):
            shell(commands["give back"], names)
            return 0
        shell(commands["give back"], names)
    raise InputError(f"{run.name}: {options.attempts} attempts did not finish it")


def attempt_run(commands: dict[str, list[str]], names: dict[str, str]) -> bool:
    """Goes through the commands once; True when training ended with code 0."""
    if shell(commands["ask for the machines"], names).returncode:
        time.sleep(POLL_SECONDS)
        return False
    while (state := shell(commands["state"], names, quiet=True).stdout.strip()) != "ACTIVE":
        if state in GONE:
            return False
        time.sleep(POLL_SECONDS)
    return all(
        not shell(commands[step], names).returncode for step in ("install", "mount", "train")
    )


def filled(words: list[str], names: dict[str, str]) -> str:
    """Returns the command line with $NAMES replaced."""
    line = shell_words(words)
    for name, value in names.items():
        line = line.replace(f"${name}", value)
    return line


def shell(
    words: list[str], names: dict[str, str], *, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs one command; its output is shown unless it is to be read."""
    line = filled(words, names)
    if not quiet:
        print(line, flush=True)
    return subprocess.run(line, shell=True, text=True, capture_output=quiet, check=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
