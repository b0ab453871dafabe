"""Commands in README.md and docs/ refer to scripts, configs and options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxllm.cli.main import build_parser
from jaxllm.planning import table
from jaxllm.training.run_folder import load_config, override

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


# What a line may begin with besides our own commands, and the one line that is only a form.
OTHERS = ("git clone https://github.com/jaxllm/jaxllm", "cd jaxllm")
FORM = "python train/STAGE.py configs/PATH.py [--dotted.key value ...] [--workdir DIR]"
VARIABLE = re.compile(r"[A-Z_]+=\S+")


def commands():
    """Every command in a bash block, one a line, and every one in the text between."""
    for page in PAGES:
        blocks = r"```bash\n(.*?)```"
        for block in re.findall(blocks, page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    if words := shlex.split(part, comments=True):
                        yield pytest.param(words, id=f"{page.name}: {part[:60]}")
        text = re.sub(blocks, "", page.read_text(), flags=re.DOTALL)
        for command in re.findall(r"`((?:python|jaxllm|make) [^`]*)`", text):
            if command != FORM:
                yield pytest.param(command.split(), id=f"{page.name}: {command[:60]}")


def check_jaxllm(words):
    """Parses; a mere mention, such as "jaxllm heads" or "... --kv NAME:...", names a subcommand."""
    if len(words) == 1 or words[-1].endswith("..."):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([words[0], "--help"])
        assert stop.value.code == 0
        return
    options, rest = build_parser().parse_known_args(words)
    if options.command == "plan":
        if options.config != "CONFIG":
            override(load_config(ROOT / options.config), rest)
    else:
        assert not rest


def check_python(script, *rest):
    assert (ROOT / script).is_file()
    if script == "train/evidence.py":
        assert f'"{rest[0]}"' in (ROOT / script).read_text()
        return
    if script == "train/launch/plans.py":
        assert table.commands((ROOT / rest[0]).read_text())
        return
    config, *rest = rest
    if script == "train/launch/tpu.py":
        for flag in ("topology", "zone", "project", "bucket", "repository"):
            place = rest.index(f"--{flag}")
            rest = rest[:place] + rest[place + 2 :]
        rest = [word for word in rest if word not in ("--run", "--on-demand")]
    if "--workdir" in rest:
        place = rest.index("--workdir")
        rest = rest[:place] + rest[place + 2 :]
    override(load_config(ROOT / config), rest)


def check_make(target, *settings):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for setting in settings:
        name, value = setting.split("=")
        assert f"$({name})" in makefile
        if target == "evidence" and name == "NAME":
            check_python("train/evidence.py", value)


@pytest.mark.parametrize("words", commands())
def test_command_is_one_that_exists(words):
    while VARIABLE.fullmatch(words[0]):
        words = words[1:]
    checks = {"python": check_python, "make": check_make}
    if words[0] == "jaxllm":
        check_jaxllm(words[1:])
    elif words[0] in checks:
        checks[words[0]](*words[1:])
    else:
        assert " ".join(words) in OTHERS


def test_nothing_is_overlooked():
    found = [" ".join(param.values[0]) for param in commands()]
    assert {"make demo", "make test", "jaxllm heads", *OTHERS} <= set(found)
    assert len(found) > 40
    for page in PAGES:  # Every block says what language it is in.
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert all(opening in ("bash", "python", "json", "text", "") for opening in fences)
        assert len(fences) % 2 == 0


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
