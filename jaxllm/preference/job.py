"""The job of a preference run, whatever its data, feedback and algorithm."""

from __future__ import annotations

from pathlib import Path

from jaxllm.preference.config import OfflineData, PreferenceRun, check_run
from jaxllm.preference.offline import offline_job
from jaxllm.preference.rollout_job import on_policy_job, sampled_once_job
from jaxllm.training.job import Job


def preference_job(run: PreferenceRun, workdir: Path) -> Job:
    """Returns the job of a run.

    Args:
      run: The config.
      workdir: The run folder; tokenizer and what is sampled before the first step are kept there.

    Raises:
      InputError: Parts that do not go together, bad records, or a folder without a model.
    """
    check_run(run)
    if isinstance(run.data, OfflineData):
        return offline_job(run, run.data, workdir)
    if run.data.refresh == "once":
        return sampled_once_job(run, run.data, workdir)
    return on_policy_job(run, run.data, workdir)
