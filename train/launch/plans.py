"""Plans every config that a page names and writes the table of the page anew.

python train/launch/plans.py docs/tpu.md [--only TEXT ...]

The commands are those of the page itself; with --only those that contain one of the texts are run,
and of the others the results kept in docs/tpu_plans.json stay. Needs libtpu, two processor cores
and one to five minutes a plan.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError, run_command
from jaxllm.planning.table import commands, with_table
from jaxllm.training.run_folder import write_json, write_text


def main() -> int:
    """Runs the commands one after the other, keeping what each printed at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    options = parser.parse_args()
    page: str = options.page.read_text(encoding="utf-8")
    store = options.page.with_name(f"{options.page.stem}_plans.json")
    kept = {one["command"]: one for one in json.loads(store.read_text())} if store.exists() else {}
    named, refused = commands(page), []
    for command in named:
        if any(text in command for text in options.only):
            print(command, flush=True)
            try:
                kept[command] = {"command": command, **planned(command)}
            except InputError as error:
                refused.append(str(error))
            write_json(store, [kept[one] for one in named if one in kept])
    write_text(options.page, with_table(page, [kept[one] for one in named if one in kept]))
    if refused:
        raise InputError("; ".join(refused))
    return 0


def planned(command: str) -> dict[str, Any]:
    """Returns what a command prints with --json.

    Raises:
      InputError: It was refused.
    """
    words = [sys.executable, "-m", "jaxllm.cli.main", *shlex.split(command)[1:], "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{command}: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
