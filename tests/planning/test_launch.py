"""Launch files: what Kubernetes, SkyPilot and a shell read out of them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxllm.cli.main import main
from jaxllm.cli.plan_command import launch_of
from jaxllm.errors import InputError
from jaxllm.planning.launch import gcloud, jobset, skypilot

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "lm" / "shakespeare.py")


@pytest.fixture(scope="module")
def run():
    return launch_of(CONFIG, ["--loop.steps", "7"], "v5e:4x8")


def test_the_command_is_one_that_the_script_takes(run):
    words = shlex.split(run.command)
    assert words[1:3] == ["train/lm.py", CONFIG] and (ROOT / words[1]).is_file()
    assert words[-2:] == ["--workdir", "/mnt/runs/shakespeare"] and "7" in words


def test_a_jobset_has_a_pod_for_every_host(run):
    found = yaml.safe_load(jobset(run))
    assert found["kind"] == "JobSet" and found["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == 8 and chips * 8 == 32
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["args"] == [f"exec {run.command}\n"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    steady = launch_of(CONFIG, [], "v5p-64", spot=False)
    pod = yaml.safe_load(jobset(steady))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["template"]["spec"]["nodeSelector"]


def test_a_skypilot_task_names_the_machines(run):
    found = yaml.safe_load(skypilot(run))
    assert found["resources"]["accelerators"] == "tpu-v5litepod-32"
    assert found["resources"]["use_spot"] is True and found["run"].strip() == run.command
    assert found["file_mounts"]["/mnt/runs"]["mode"] == "MOUNT"


def test_gcloud_asks_installs_and_trains_on_all_workers(run):
    commands = dict(gcloud(run))
    create = commands["ask for the machines"]
    assert create[create.index("--accelerator-type") + 1] == "v5litepod-32" and "--spot" in create
    assert all("--worker=all" in commands[step] for step in ("install", "mount", "train"))


def test_render_writes_files_that_a_shell_can_read(tmp_path, capsys):
    folder = tmp_path / "launch"
    arguments = ["plan", CONFIG, "--topology", "v5e:4x4", "--render", str(folder), "--json"]
    assert main([*arguments, "--loop.steps", "9"]) == 0
    written = json.loads(capsys.readouterr().out)["rendered"]
    assert {Path(path).name for path in written} == {
        "gcloud.sh", "jobset.yaml", "skypilot.yaml", "xpk.sh",
    }  # fmt: skip
    for path in folder.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert "--loop.steps 9" in path.read_text()
    assert main(["plan", CONFIG, "--topology", "cpu:8", "--render", str(folder)]) == 2
    assert "--render needs a TPU topology" in capsys.readouterr().err


def test_the_launcher_starts_again_until_training_ends(tmp_path):
    """A `gcloud` that loses the machines once: the second attempt trains to the end."""
    fake = tmp_path / "gcloud"
    fake.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/log\n'
        'case "$*" in *describe*) echo ACTIVE;; *train/lm.py*) '
        f"[ -e {tmp_path}/lost ] || {{ touch {tmp_path}/lost; exit 1; }};; esac\n"
    )
    fake.chmod(0o755)
    where = ["--zone", "z", "--project", "p", "--bucket", "b", "--repository", "r"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / "launch" / "tpu.py"), CONFIG,
         "--topology", "v5e:4x4", *where, "--run", "--loop.steps", "3"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    steps = ["create", "describe", "install", "gcsfuse", "train/lm.py", "delete"]
    assert [next(s for s in steps if s in line) for line in log] == steps * 2
    assert all("$" not in line and "--zone z" in line for line in log)


def test_only_what_runs_on_many_hosts_is_launched():
    with pytest.raises(InputError, match="DemoRun does not run on many hosts"):
        launch_of(str(ROOT / "configs" / "images" / "demo.py"), [], "v5e:4x4")
