"""Completions sampled from the policy, judged, and turned into the examples of an algorithm.

Sampling is the library's decode loop in the same process, one compiled program for all steps. What
is drawn depends on the run's seed, the step, the prompt's place in the step and the sample's number
only, so a resumed run draws the same. Of several processes each samples and judges its own part of
the prompts, with a copy of the policy on its own devices, and tells the others what it found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.data.line_file import LineFile
from jaxllm.data.records import parse_record
from jaxllm.decoding.generate import Completion, TextGenerator
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import TextSampling
from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.processes import gathered
from jaxllm.parallel.sharding import own_copy
from jaxllm.preference.config import OnPolicyData, Target
from jaxllm.preference.feedback import (
    Feedback,
    label_examples,
    list_examples,
    pair_examples,
    rejection_sample,
    scores_to_pairs,
)
from jaxllm.preference.policy import Policy
from jaxllm.preference.records import Example
from jaxllm.preference.reviews import load_snippets

Tree = Any
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """K completions of each of P prompts with their scores.

    Attributes:
      prompts: Ids of each prompt.
      completions: [P][K].
      scores: float64 [P, K].
    """

    prompts: list[Ids]
    completions: list[list[Completion]]
    scores: np.ndarray

    @property
    def ids(self) -> list[list[Ids]]:
        """Ids of the completions, [P][K]."""
        return [[tuple(c.ids) for c in row] for row in self.completions]


def read_prompts(data: OnPolicyData, model: LanguageModel) -> list[Ids]:
    """Returns the ids of all prompts, cut at the front to `max_prompt` tokens.

    Raises:
      InputError: A bad record, or more held back than there are.
    """
    if data.prompts == "reviews":
        tokenizer = model.need_tokenizer("prompts")
        words = (s.text.split()[: data.prompt_words] for s in load_snippets())
        texts = [*dict.fromkeys(" ".join(w) for w in words if len(w) == data.prompt_words)]
        bos = tokenizer.adds_bos
        found = [tokenizer.encode(text, bos=bos) for text in texts[: data.max_prompts]]
    else:
        file = LineFile(Path(data.prompts))
        found = []
        for number in range(len(file)):
            if file[number].strip():
                where = file.where(number)
                found.append(model.prompt_ids(parse_record(file[number], where), where))
    if not found:
        raise InputError(f"{data.prompts}: holds no prompts")
    prompts = [tuple(ids[-data.max_prompt :]) for ids in found[: data.max_prompts]]
    if data.validation_prompts >= len(prompts):
        raise InputError(
            f"data.validation_prompts {data.validation_prompts} leaves none of {len(prompts)}"
        )
    return prompts


class Rollouts:
    """The policy's sampler and the judge of what it says.

    Args:
      policy: Whose completions.
      data: How they are drawn.
      feedback: Scores them.
      seed: Of all draws.

    Raises:
      InputError: A policy without a tokenizer, more tokens than it has positions for, or prompts
        that do not divide over the processes.
    """

    def __init__(self, policy: Policy, data: OnPolicyData, feedback: Feedback, seed: int):
        if data.batch_size % jax.process_count():
            raise InputError(
                f"data.batch_size {data.batch_size} prompts do not divide over "
                f"{jax.process_count()} processes"
            )
        model = policy.language_model()
        self.tokenizer = model.need_tokenizer("feedback on texts")
        model.check_length(data.max_prompt + data.max_new_tokens, "prompt and completion")
        self.policy, self.data, self.feedback, self.seed = policy, data, feedback, seed
        self.sampler = model.sampler()
        self.sampling = TextSampling(
            data.max_new_tokens,
            temperature=data.temperature,
            top_k=data.top_k,
            top_p=data.top_p,
            stop_ids=policy.eos,
        )
        self._merged: Callable[[Tree, Tree], Tree] = jax.jit(policy.merged)

    def parameters(self, params: Tree, extra: Tree) -> Tree:
        """Parameters of the policy for decoding; with adapters a new tree, once per sampling.

        Of several processes each gets the whole of them on each of its devices.
        """
        found = params["policy"] if self.policy.lora is None else self._merged(params, extra)
        return found if jax.process_count() == 1 else own_copy(found, jax.sharding.get_mesh())

    def __call__(
        self, params: Tree, prompts: Sequence[Ids], step: int, *, greedy: bool = False
    ) -> Sampled:
        """Samples and judges completions.

        Args:
          params: See `parameters`.
          prompts: The prompts of a step, all steps having as many.
          step: The step, which the draws depend on.
          greedy: One most likely completion of each instead.
        """
        share = len(prompts) // jax.process_count()
        first = jax.process_index() * share
        own = prompts[first : first + share]
        with _own_devices():
            completions = self._sample(params, own, step, first, greedy)
            texts = [[c.text or "" for c in row] for row in completions]
            scores = self.feedback([self.tokenizer.decode(ids) for ids in own], texts)
        if jax.process_count() == 1:
            return Sampled(list(prompts), completions, scores)
        told = [[asdict(c) for c in row] for row in completions]
        parts = gathered({"completions": told, "scores": scores.tolist()})
        return Sampled(
            list(prompts),
            [[Completion(**c) for c in row] for part in parts for row in part["completions"]],
            np.concatenate([np.array(part["scores"], np.float64) for part in parts]),
        )

    def _sample(
        self, params: Tree, prompts: Sequence[Ids], step: int, first: int, greedy: bool
    ) -> list[list[Completion]]:
        """Completions of a part of the prompts of a step, from prompt number `first` on."""
        sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
        seed = np.random.SeedSequence((self.seed, step)).generate_state(1)[0] >> 1
        generate = TextGenerator(params, {}, self.sampler, self.tokenizer)
        return generate(
            [list(ids) for ids in prompts],
            sampling,
            samples=1 if greedy else self.data.samples,
            seed=int(seed),
            batch=len(prompts),
            least_prompt=self.data.max_prompt,
            first=first,
        )

    def many(self, params: Tree, prompts: Sequence[Ids], first_step: int = 0) -> Sampled:
        """Samples and judges completions of any number of prompts, a step's number at a time."""
        size, parts = self.data.batch_size, []
        for number, start in enumerate(range(0, len(prompts), size)):
            group = list(prompts[start : start + size])
            filled = group + group[-1:] * (size - len(group))
            found = self(params, filled, first_step + number)
            n = len(group)
            parts.append(Sampled(group, found.completions[:n], found.scores[:n]))
        return Sampled(
            [ids for part in parts for ids in part.prompts],
            [row for part in parts for row in part.completions],
            np.concatenate([part.scores for part in parts]),
        )


def _own_devices() -> Any:
    """Where one of several processes computes by itself; one alone stays on the mesh it is on."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(devices=jax.local_devices()))


# -- examples ------------------------------------------------------------------------------------


def sampled_examples(
    sampled: Sampled, data: OnPolicyData, target: Target, seed: int
) -> list[Example]:
    """Returns what an algorithm trains on: the completions that `data.select` keeps.

    Args:
      sampled: Completions and scores.
      data: How they are chosen.
      target: What the algorithm takes. Pairs of equal scores or equal completions are left out.
      seed: Of random choices.
    """
    prompts, ids, scores = sampled.prompts, sampled.ids, sampled.scores
    if target == "pairs":
        pool = scores
        chosen = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
        if data.select == "rejection":
            chosen = rejection_sample(scores, data.rejection_beta, 2, seed)
            pool = np.take_along_axis(scores, chosen, 1)
        how = "random" if data.select == "plain" else "best_worst"
        pairs = scores_to_pairs(pool, how, min_margin=data.min_margin, seed=seed)  # type: ignore[arg-type]
        kept = [[row[k] for k in places] for row, places in zip(ids, chosen, strict=True)]
        return pair_examples(prompts, kept, pairs)
    if target == "labels":
        return label_examples(prompts, ids, scores, data.threshold)
    if target == "lists":
        return list_examples(prompts, ids, scores)
    places = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    if target == "completions" and data.select == "best_of_n":
        places = np.argmax(scores, 1)[:, None]
    elif target == "completions" and data.select == "rejection":
        places = rejection_sample(scores, data.rejection_beta, data.accepted, seed)
    with_scores = target in ("rewards", "rollouts")
    return [
        Example(
            prompts[p],
            (ids[p][k],),
            scores=(float(scores[p, k]),) if with_scores else None,
            identity=f"prompt {p} completion {k}",
        )
        for p, row in enumerate(places.tolist())
        for k in row
    ]


def examples_per_prompt(data: OnPolicyData, target: Target) -> int:
    """How many examples a prompt makes, at most."""
    if target in ("pairs", "lists"):
        return 1
    if target == "completions" and data.select != "plain":
        return 1 if data.select == "best_of_n" else data.accepted
    return data.samples


def completions_per_example(data: OnPolicyData, target: Target) -> int:
    """How many completions an example has."""
    return {"pairs": 2, "lists": data.samples}.get(target, 1)


# -- kept samples --------------------------------------------------------------------------------


def sample_records(sampled: Sampled, decode: Callable[[Ids], str]) -> list[dict[str, Any]]:
    """Returns one JSON object for each prompt, which `records.read_examples` reads as a list."""
    return [
        {
            "prompt_ids": list(prompt),
            "completions_ids": [c.ids for c in row],
            "scores": scores,
            "texts": [decode(prompt), *(c.text for c in row)],
        }
        for prompt, row, scores in zip(
            sampled.prompts, sampled.completions, sampled.scores.tolist(), strict=True
        )
    ]


def read_samples(path: Path) -> Sampled:
    """Reads what `sample_records` wrote.

    Raises:
      InputError: A damaged file.
    """
    file = LineFile(path)
    rows = [parse_record(file[i], file.where(i)) for i in range(len(file))]
    try:
        return Sampled(
            [tuple(row["prompt_ids"]) for row in rows],
            [[Completion(ids=list(ids)) for ids in row["completions_ids"]] for row in rows],
            np.array([row["scores"] for row in rows], np.float64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not samples of a run ({error}); delete it") from None
