"""What sampled texts say about beliefs: parsing, class-belief and belief-preference consistency.

A sample reads `d<option>answer`, d being a belief's number (section 4 of arXiv:2412.20299). The
released evaluation counts an unreadable number as belief 0 and a failed judgement as agreement;
both are options here, and off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxllm.errors import InputError
from jaxllm.evals.statistics import Interval, wilson_interval


def parse_belief(sample: str, beliefs: int = 6) -> int | None:
    """The belief number that a sample begins with; None if it is missing or too large."""
    first = sample.strip()[:1]
    number = int(first) if first.isascii() and first.isdigit() else beliefs
    return number if number < beliefs else None


def parse_option(sample: str) -> str | None:
    """The text in the first `<...>` of a sample; None without one."""
    found = re.search(r"<([^<>]*)>", sample)
    return found.group(1).strip() if found else None


def class_belief_consistency(
    samples: Sequence[str], option_beliefs: Mapping[str, int], beliefs: int = 6
) -> Interval:
    """CBC: share of samples whose option is known and belongs to the number they begin with.

    Raises:
      InputError: No samples.
    """
    if not samples:
        raise InputError("no samples, expected at least one")
    agree = 0
    for sample in samples:
        number, option = parse_belief(sample, beliefs), parse_option(sample)
        agree += number is not None and option is not None and option_beliefs.get(option) == number
    return wilson_interval(agree, len(samples))


def belief_preference_consistency(
    verdicts: Sequence[bool | None], *, unjudged_agree: bool = False
) -> tuple[Interval, int]:
    """BPC: share of samples whose answer a judge finds to express the option they state.

    Args:
      verdicts: Of each sample; None where there is no verdict (an error, an unreadable answer).
      unjudged_agree: Count those as agreement, as the released evaluation does; otherwise they are
        left out.

    Returns:
      The share with its interval, and the number of samples without a verdict.

    Raises:
      InputError: No verdict at all.
    """
    judged = [
        unjudged_agree if v is None else v for v in verdicts if unjudged_agree or v is not None
    ]
    if not judged:
        raise InputError(f"none of {len(verdicts)} samples has a verdict, expected at least one")
    return wilson_interval(sum(judged), len(judged)), sum(v is None for v in verdicts)
