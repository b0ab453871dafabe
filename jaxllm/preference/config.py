"""The config of a preference run: model, data, feedback, algorithm.

The unified view (section 2 of arXiv:2409.02795) takes preference learning apart into these four,
and any of one goes with any of another: whether data is sampled from the policy is a matter of
`data`, who judges it of `feedback`, and what the judgement does to the policy of `algorithm`. What
does not go together is refused by `check_run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.data.images import bundled
from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.lora import LoraConfig
from jaxllm.nn.stack import Remat
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.preference.formats import BeliefPairs, Kind
from jaxllm.preference.mixture import AlgorithmConfig
from jaxllm.preference.options import Options, above, at_least, between
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pointwise import RFT
from jaxllm.preference.records import Limits, RecordConfig
from jaxllm.preference.registry import ALGORITHMS, algorithm, algorithm_of, needs
from jaxllm.preference.rows import Layout, RowConfig
from jaxllm.preference.statistics import (
    ListStats,
    PairStats,
    PointStats,
    RewardPairs,
    RolloutStats,
)
from jaxllm.preference.wrappers import TRDPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

JOB = "preference"
REFERENCE_NEEDS = ("ref_logps", "ref_token_logps", "kl")
Target = Literal["pairs", "labels", "rewards", "completions", "lists", "rollouts"]


# -- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoReference:
    """What the algorithm needs: nothing, a moving one (TR-DPO), adapters off, or a frozen copy."""


@dataclass(frozen=True)
class FrozenReference:
    """A copy of a model that stays as it is."""

    folder: str | None = None
    """Another model of the same vocabulary; None for the policy before its first step."""


@dataclass(frozen=True)
class AdaptersOff:
    """The policy without its adapters; takes no memory."""


@dataclass(frozen=True)
class MovingReference(Options):
    """A copy that follows the policy: every 1 and a small alpha make it a moving average."""

    alpha: float = between(0, 1, 0.01)
    """Share of the policy in the mixture."""
    every: int = above(0, 1)
    """Steps between two moves."""


@dataclass(frozen=True)
class PrecomputedReference:
    """Log-probs of a frozen model, computed before the first step; the model is then dropped."""

    folder: str | None = None
    """As of `FrozenReference`."""
    cache: str | None = None
    """Folder that keeps them for later runs; None for the user's cache folder."""


@dataclass(frozen=True)
class NoReference:
    """None, for algorithms that need none."""


Reference = (
    AutoReference
    | FrozenReference
    | AdaptersOff
    | MovingReference
    | PrecomputedReference
    | NoReference
)


@dataclass(frozen=True)
class ModelConfig:
    """The policy, and what it is held against."""

    policy: str
    """A run or Hugging Face folder, or `bundled:stories260K`."""
    reference: Reference = AutoReference()
    lora: LoraConfig | None = None
    """Train low-rank adapters only; None trains all parameters."""
    remat: Remat = "none"
    """What the backward pass may keep of a layer."""
    check_start: bool = True
    """Refuse a start at which policy and reference differ where they must be equal."""
    architecture: DecoderConfig | None = None
    """The policy's, from which a run is planned without its folder; training refuses a folder that
    holds another. None takes what the folder holds."""


def model_folder(name: str) -> str:
    """Returns the folder that `bundled:NAME` or a path names."""
    prefix = "bundled:"
    return str(bundled(name.removeprefix(prefix))) if name.startswith(prefix) else name


# -- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineData:
    """Records of a file, see `formats.py`: pairs, completions with labels, lists with scores."""

    file: str = ""
    validation_file: str | None = None
    format: Kind | None = None
    """None recognises it by the fields of each record."""
    belief_pairs: BeliefPairs = "conditioned"
    """What rejected completions of GDPO rows state: the chosen one's belief, or their own."""
    unpair: bool = False
    """Make two completions with labels of each pair, for algorithms that take labels."""
    boundary: Literal["join", "refuse"] = "join"
    """Whether a token across the end of the prompt joins the completion or is an error."""
    max_prompt: int | None = None
    keep_prompt: Literal["end", "start"] = "end"
    max_completion: int | None = None
    max_list: int | None = None
    """Most completions of a record; a longer list is a bad record. Plans need it for lists."""
    max_beliefs: int | None = None
    """Most beliefs of a record; more are a bad record. Plans need it for GDPO."""
    skip_bad: bool = False
    """Leave bad records out, counted and listed, instead of stopping at the first."""
    layout: Layout = "padded"
    batch_size: int = 16
    """Examples per step; with `rows` the most that a step may have."""
    row_length: int = 512
    """Tokens of a row; longer examples are cut with `truncate` and refused without."""
    rows: int | None = None
    """Rows per step into which examples are packed; None for one row per completion."""
    truncate: bool = True

    def record_config(self) -> RecordConfig:
        """Returns how the file is read."""
        longest = self.row_length + 1 if self.truncate else None
        limits = Limits(
            self.max_prompt,
            self.keep_prompt,
            self.max_completion,
            longest,
            self.max_list,
            self.max_beliefs,
        )
        return RecordConfig(
            self.format, self.belief_pairs, self.boundary, limits, skip_bad=self.skip_bad
        )

    def row_config(self) -> RowConfig:
        """Returns the shapes of a batch."""
        return RowConfig(self.layout, self.batch_size, self.row_length, self.rows)


@dataclass(frozen=True)
class OnPolicyData(Options):
    """Completions sampled from the policy, judged by `feedback`."""

    prompts: str = "reviews"
    """A JSONL file with `prompt`, `messages` or `prompt_ids`; `reviews` for the first words of the
    bundled film reviews."""
    prompt_words: int = above(0, 4)
    """Words of each review that make a prompt."""
    max_prompts: int | None = above(0, None)
    """Only so many prompts of the file."""
    refresh: Literal["step", "once"] = "step"
    """Sample anew at every step, or once, from the policy before its first step."""
    samples: int = above(0, 8)
    """Completions of each prompt, K."""
    select: Literal["plain", "best_of_n", "rejection"] = "plain"
    """Which are used. Single completions: all, the best, or `accepted` of them by statistical
    rejection sampling. Pairs: two different ones, the best and the worst, or two accepted ones."""
    accepted: int = above(0, 2)
    rejection_beta: float = above(0, 0.5)
    """KL strength of rejection sampling."""
    min_margin: float = at_least(0, 0.0)
    """Pairs need a larger difference of scores."""
    threshold: float = 0.0
    """Score from which a completion is desirable."""
    max_new_tokens: int = above(0, 64)
    temperature: float = above(0, 1.0)
    top_k: int = at_least(0, 0)
    top_p: float = between(0, 1, 1.0)
    epochs: int = above(0, 1)
    """Passes over the completions of a step, with `refresh: step`."""
    minibatches: int = above(0, 1)
    """Updates of a pass, each on another part of the completions; drawn anew in every pass."""
    layout: Literal["padded", "shared_prompt"] = "padded"
    batch_size: int = above(0, 8)
    """Prompts per step."""
    max_prompt: int = above(0, 64)
    """Tokens; the end of a longer prompt is kept."""
    validation_prompts: int = at_least(0, 0)
    """Prompts kept back for evaluation: the mean score of completions of the policy."""

    @property
    def updates(self) -> int:
        """Updates of the policy per sampling."""
        return self.epochs * self.minibatches


DataConfig = OfflineData | OnPolicyData


# -- feedback ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GivenFeedback:
    """The preferences, labels or scores that the records hold."""


@dataclass(frozen=True)
class LexiconFeedback:
    """Mean valence of the words of a completion by the bundled lexicon, -4 to 4."""


@dataclass(frozen=True)
class RuleFeedback:
    """A function (prompt, completion) -> score."""

    function: str = ""
    """Where it is: package.module:name."""


@dataclass(frozen=True)
class RewardModelFeedback:
    """A run of `train/reward.py`."""

    run: str = ""
    batch_size: int = 64


@dataclass(frozen=True)
class VerifierFeedback:
    """A function (prompts, completions) -> scores, such as a verifier."""

    function: str = ""
    """Where it is: package.module:name."""
    batch_size: int = 64


@dataclass(frozen=True)
class JudgeFeedback:
    """A function (prompt, first, second) -> whether the first is better, or None for a tie."""

    function: str = ""
    """Where it is: package.module:name."""


FeedbackConfig = (
    GivenFeedback
    | LexiconFeedback
    | RuleFeedback
    | RewardModelFeedback
    | VerifierFeedback
    | JudgeFeedback
)


# -- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceRun:
    """Four parts that say what is learned, and how training goes as for every job."""

    model: ModelConfig
    data: DataConfig
    feedback: FeedbackConfig = GivenFeedback()
    algorithm: AlgorithmConfig = DPO()
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6, beta2=0.999)
    )
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


def name_algorithms(arguments: list[str]) -> list[str]:
    """Lets `--algorithm.kind` take the names of the registry: `gdpo` is GroupDistributionalPO.

    Raises:
      InputError: No algorithm of that name; the nearest ones are listed.
    """
    out = list(arguments)
    for place, argument in enumerate(out):
        key, equals, value = argument.partition("=")
        if key != "--algorithm.kind":
            continue
        if equals:
            out[place] = f"{key}={_class_name(value)}"
        elif place + 1 < len(out):
            out[place + 1] = _class_name(out[place + 1])
    return out


def _class_name(name: str) -> str:
    """The name of an algorithm's class, given that or the one in the registry."""
    classes = {entry.config.__name__ for entry in ALGORITHMS.values()}
    return name if name in classes else algorithm(name).config.__name__


def needs_reference(options: Any) -> bool:
    """Whether an algorithm reads anything of a reference."""
    return any(name in REFERENCE_NEEDS for name in needs(options))


def resolved_reference(run: PreferenceRun) -> Reference:
    """The kind of reference that `AutoReference` stands for in this run, or the one given."""
    given = run.model.reference
    if isinstance(run.algorithm, TRDPO):
        if not isinstance(given, AutoReference):
            raise InputError("tr_dpo moves its own reference; leave model.reference at its default")
        return MovingReference(run.algorithm.alpha, run.algorithm.every)
    if not isinstance(given, AutoReference):
        return given
    if not needs_reference(run.algorithm):
        return NoReference()
    return FrozenReference() if run.model.lora is None else AdaptersOff()


def target_of(run: PreferenceRun) -> Target:
    """What examples the algorithm wants of this run's data.

    Raises:
      InputError: A reward model's loss, which `train/reward.py` trains.
    """
    kinds, wanted = algorithm_of(run.algorithm).stats, needs(run.algorithm)
    parts = getattr(run.algorithm, "parts", ())
    for part in parts:
        kinds = tuple(k for k in kinds if k in algorithm_of(part.algorithm).stats)
    if not kinds:
        names = ", ".join(algorithm_of(p.algorithm).name for p in parts)
        raise InputError(f"the parts {names} take different kinds of examples")
    if kinds == (RewardPairs,):
        raise InputError("algorithm bradley_terry is of reward models; use train/reward.py")
    if "desirable" in wanted:
        return "labels"
    if "rewards" in wanted:
        return "rewards"
    if RolloutStats in kinds:
        return "rollouts"
    if PairStats in kinds:
        # What takes both (SFT) wants completions; with beliefs (GDPO) it is told by its labels.
        return "completions" if PointStats in kinds and "beliefs" not in wanted else "pairs"
    return "lists" if ListStats in kinds else "completions"


def check_run(run: PreferenceRun) -> None:
    """Refuses parts that do not go together.

    Raises:
      InputError: Naming the two.
    """
    name, wanted, target = algorithm_of(run.algorithm).name, needs(run.algorithm), target_of(run)
    kind = type(resolved_reference(run)).__name__
    has = kind != "NoReference"
    if has and not needs_reference(run.algorithm):
        raise InputError(f"algorithm {name} reads no reference, but model.reference is {kind}")
    if not has and needs_reference(run.algorithm):
        raise InputError(f"algorithm {name} reads a reference, but model.reference is {kind}")
    if kind == "AdaptersOff" and run.model.lora is None:
        raise InputError("model.reference AdaptersOff needs model.lora")
    if kind == "MovingReference" and run.model.lora is not None:
        raise InputError("a moving reference does not go with model.lora")
    online = isinstance(run.data, OnPolicyData)
    fresh = isinstance(run.data, OnPolicyData) and run.data.refresh == "step"
    if online and run.optimizer.accumulate > 1 and fresh:
        raise InputError("optimizer.accumulate does not go with samples of every step")
    if kind == "PrecomputedReference":
        if "kl" in wanted:
            raise InputError(f"algorithm {name} reads a KL over the vocabulary; not precomputed")
        if fresh:
            raise InputError("a precomputed reference does not know what is sampled at every step")
    if online and isinstance(run.feedback, GivenFeedback):
        raise InputError(
            "sampled completions have no labels; set feedback to something that scores"
        )
    if target == "rewards" and not fresh and not isinstance(run.algorithm, RFT):
        raise InputError(f"algorithm {name} compares a prompt's samples; data must be on-policy")
    if target == "rollouts" and not fresh:
        raise InputError(
            f"algorithm {name} trains on samples of every step; data must be on-policy"
        )
    if online and "mismatched" in wanted and run.data.batch_size < 2:
        raise InputError(f"algorithm {name} needs two prompts per step, data.batch_size is 1")
    if not online and run.data.unpair and target != "labels":  # type: ignore[union-attr]
        raise InputError(f"data.unpair makes labels, which algorithm {name} does not take")
    if "beliefs" in wanted and online:
        raise InputError(f"algorithm {name} reads beliefs, which sampled completions do not state")
    _check_sampling(run, target)


def _check_sampling(run: PreferenceRun, target: Target) -> None:
    data = run.data
    if not isinstance(data, OnPolicyData):
        return
    if data.select != "plain" and target not in ("pairs", "completions"):
        raise InputError(
            f"data.select {data.select} with algorithm {algorithm_of(run.algorithm).name}, which "
            "reads all completions; expected plain"
        )
    if data.select == "rejection" and data.accepted > data.samples:
        raise InputError(f"data.accepted {data.accepted} is more than samples {data.samples}")
    _check_updates(run.algorithm, data, target)
    group = getattr(run.algorithm, "group_size", None)
    if group is not None and group != data.samples:
        raise InputError(f"algorithm.group_size {group} differs from data.samples {data.samples}")
    least = 2 if target in ("pairs", "lists") else 1
    if data.samples < least:
        raise InputError(f"data.samples {data.samples}, expected at least {least} for {target}")


def _check_updates(options: Any, data: OnPolicyData, target: Target) -> None:
    """Several updates on one sampling need the ratio to the policy that sampled."""
    if data.updates == 1:
        return
    given = f"data.epochs {data.epochs} and data.minibatches {data.minibatches}"
    if data.refresh == "once" or target != "rollouts":
        raise InputError(f"{given} are for policy gradients on fresh samples")
    parts = [part.algorithm for part in getattr(options, "parts", ())] or [options]
    for part in parts:
        if getattr(part, "epsilon", None) is None:
            name = algorithm_of(part).name
            raise InputError(
                f"{given}: algorithm {name} has no clipped ratio to the policy that sampled, so it "
                "takes one update per sampling"
            )
    if data.minibatches > 1 and len(parts) > 1:
        raise InputError(
            f"data.minibatches {data.minibatches}: the parts of weighted_sum have advantages of "
            "their own; expected one algorithm"
        )
    if data.batch_size * data.samples % data.minibatches:
        raise InputError(
            f"data.minibatches {data.minibatches} does not divide the "
            f"{data.batch_size * data.samples} completions of a step"
        )
