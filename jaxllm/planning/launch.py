"""Files that start a training run on Cloud TPU: gcloud, GKE JobSet, XPK, SkyPilot.

Every host runs the same command; the processes find each other (`parallel.mesh`), and the same
command resumes from the run folder, so a retry is a restart. The run folder must be one that all
hosts share: a mounted bucket or a file server, at RUNS below.

Names in capitals are the user's: PROJECT, ZONE, BUCKET, REPOSITORY (the git URL of the code),
CLUSTER and IMAGE (a container with the code in /jaxllm and its .venv).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.errors import InputError
from jaxllm.planning.topologies import Topology
from jaxllm.training.run_folder import write_text

RUNS = "/mnt/runs"
# Image of a TPU VM and GKE's label of its chips, as in Cloud TPU's and GKE's documentation.
_RUNTIME = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_LABEL = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
INSTALL = (
    "git clone $REPOSITORY jaxllm && cd jaxllm && "
    "python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
)


@dataclass(frozen=True)
class Launch:
    """One run on one topology."""

    script: str
    """The file in train/ that runs the config."""
    config: str
    overrides: tuple[str, ...]
    topology: Topology
    spot: bool = True

    def __post_init__(self) -> None:
        if self.topology.chip is None:
            raise InputError(f"--render needs a TPU topology, not {self.topology.name}")
        if self.topology.slices > 1:
            raise InputError(f"--render writes files for one slice, not {self.topology.name}")

    @property
    def name(self) -> str:
        """Of the run, made of what Kubernetes and Cloud TPU allow."""
        return "".join(c if c.isalnum() else "-" for c in Path(self.config).stem.lower())

    @property
    def command(self) -> str:
        """What every host runs."""
        words = [f"train/{self.script}", self.config, *self.overrides]
        words += ["--workdir", f"{RUNS}/{self.name}"]
        return ".venv/bin/python " + shlex.join(words)

    @property
    def chip(self) -> str:
        """Generation."""
        assert self.topology.chip is not None
        return self.topology.chip.name

    @property
    def runtime(self) -> str:
        """Image of the machines."""
        return _RUNTIME[self.chip]


def gcloud(run: Launch) -> list[tuple[str, list[str]]]:
    """Returns (what it does, words) of each command, from nothing to a running job."""
    where = ["--zone", "$ZONE", "--project", "$PROJECT"]
    tpus = ["gcloud", "compute", "tpus"]
    create = [*tpus, "queued-resources", "create", run.name, "--node-id", run.name,
              "--accelerator-type", str(run.topology.accelerator_type),
              "--runtime-version", run.runtime, *where]  # fmt: skip
    ssh = [*tpus, "tpu-vm", "ssh", run.name, "--worker=all", *where, "--command"]
    return [
        ("ask for the machines", create + (["--spot"] if run.spot else [])),
        ("state", [*tpus, "queued-resources", "describe", run.name, *where,
                   "--format=value(state.state)"]),
        ("install", [*ssh, INSTALL]),
        ("mount", [*ssh, f"sudo mkdir -p {RUNS} && sudo chmod 777 {RUNS} && "
                   f"gcsfuse --implicit-dirs $BUCKET {RUNS}"]),
        ("train", [*ssh, f"cd jaxllm && {run.command}"]),
        ("give back", [*tpus, "queued-resources", "delete", run.name, "--force", "--quiet",
                       *where]),
    ]  # fmt: skip


def shell_words(words: Sequence[str]) -> str:
    """Returns words for a shell that fills in $NAMES."""
    quoted = (f'"{word}"' if "$" in word else shlex.quote(word) for word in words)
    return " ".join(quoted)


def gcloud_script(run: Launch) -> str:
    """Returns the commands as a shell script; the launcher in train/launch/ repeats them."""
    lines = [
        "#!/bin/bash",
        "# Set PROJECT, ZONE, BUCKET and REPOSITORY first.",
        "set -euo pipefail",
        "",
    ]
    for what, words in gcloud(run):
        if what not in ("state", "give back"):
            lines += [f"# {what}", shell_words(words), ""]
        elif what == "state":
            lines += [
                "# wait for the machines",
                f'until [ "$({shell_words(words)})" = ACTIVE ]; do sleep 30; done',
                "",
            ]
        else:
            lines += [f"# When done: {shell_words(words)}", ""]
    return "\n".join(lines)


def jobset(run: Launch) -> str:
    """Returns a JobSet for GKE: one pod a host; a failed or preempted one restarts them all."""
    shape = "x".join(map(str, run.topology.shape))
    hosts = run.topology.hosts
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {run.name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {_LABEL[run.chip]}
                cloud.google.com/gke-tpu-topology: {shape}
{
        '''                cloud.google.com/gke-spot: "true"
'''
        if run.spot
        else ""
    }\
              containers:
                - name: jaxllm
                  image: IMAGE
                  workingDir: /jaxllm
                  command: ["/bin/bash", "-c"]
                  args:
                    - |
                      exec {run.command}
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: {run.topology.chips // hosts}
                  volumeMounts:
                    - name: runs
                      mountPath: {RUNS}
              volumes:
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: BUCKET
"""


def skypilot(run: Launch) -> str:
    """Returns a task for `sky jobs launch`, which starts a preempted run again."""
    return f"""\
name: {run.name}

resources:
  infra: gcp
  accelerators: tpu-{run.topology.accelerator_type}
  accelerator_args:
    runtime_version: {run.runtime}
  use_spot: {"true" if run.spot else "false"}

file_mounts:
  {RUNS}:
    name: BUCKET
    store: gcs
    mode: MOUNT

workdir: .

setup: |
  python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'

run: |
  {run.command}
"""


def xpk(run: Launch) -> str:
    """Returns the command that starts the run on an XPK cluster."""
    words = ["xpk", "workload", "create", "--cluster", "$CLUSTER", "--workload", run.name,
             f"--tpu-type={run.topology.accelerator_type}", "--num-slices=1",
             "--docker-image", "$IMAGE", "--zone", "$ZONE", "--project", "$PROJECT",
             "--max-restarts=100", "--command", f"cd /jaxllm && {run.command}"]  # fmt: skip
    return f"#!/bin/bash\n# Set PROJECT, ZONE, CLUSTER and IMAGE first.\n{shell_words(words)}\n"


FILES: dict[str, Callable[[Launch], str]] = {
    "gcloud.sh": gcloud_script,
    "jobset.yaml": jobset,
    "skypilot.yaml": skypilot,
    "xpk.sh": xpk,
}


def render(run: Launch, folder: Path) -> list[str]:
    """Writes every file and returns their paths.

    Raises:
      InputError: The folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file is where the folder should be")
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        write_text(folder / name, make(run))
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
    return [str(folder / name) for name in FILES]
