"""Commands in README.md and docs/ refer to scripts, configs and options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxllm.cli.main import build_parser
from jaxllm.training.run_folder import load_config, override

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ("python", "jaxllm"):
                    yield pytest.param(words, id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("words", commands())
def test_command_parses(words):
    if words[0] == "jaxllm":
        options, rest = build_parser().parse_known_args(words[1:])
        if options.command == "plan":
            override(load_config(ROOT / options.config), rest)
        else:
            assert not rest
        return
    script, config, *rest = words[1:]
    assert (ROOT / script).is_file()
    if script == "train/launch/tpu.py":
        for flag in ("topology", "zone", "project", "bucket", "repository"):
            place = rest.index(f"--{flag}")
            rest = rest[:place] + rest[place + 2 :]
        rest = [word for word in rest if word not in ("--run", "--on-demand")]
    if "--workdir" in rest:
        place = rest.index("--workdir")
        rest = rest[:place] + rest[place + 2 :]
    override(load_config(ROOT / config), rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:tests|train|configs|docs)/[\w./]+?\.(?:py|md))`", text):
        assert (ROOT / named).exists(), named


def test_the_tables_name_tests_that_exist():
    rows = re.findall(
        r"`(tests/\S+\.py)` \| `(test_\w+)` \|", (ROOT / "docs/images.md").read_text()
    )
    assert len(rows) > 10
    for file, name in rows:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)
