"""Losses and logged metrics of TRL's trainers on one small batch, which `test_trl.py` compares.

    pip install -e ".[parity]"
    PYTHONPATH=. python tests/preference/trl_losses.py

writes `golden/trl.npz`: weights of policy and reference, token ids, log-probs of every token by
plain forward passes, and what each trainer makes of the batch. The trainers are TRL's own, on a
Llama of random weights on the CPU in float32; they get token ids through their own collators, and
only sampling is replaced, by the completions of the batch. Their unpaired BCO and PPO are gone from
TRL 1.16.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "trl.npz"
VOCAB, PAD, EOS = 32, 0, 1
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": EOS,
}
SIDES = ("chosen", "rejected")
MARGINS = [0.5, 0.0, 1.0, 0.25, 0.0, 0.75]
GROUP, LONGEST = 4, 8
REWARDS = [1.0, 0.0, 0.5, 1.0, -1.0, 2.0, 0.25, 0.75]

DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"], "beta": 0.01},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"], "beta": 0.05, "discopop_tau": 0.05},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
CPO: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    "alphapo": {
        **{"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.1},
        "alpha": 0.25,
    },
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
REWARD: dict[str, dict[str, Any]] = {
    "bradley_terry": {},
    "centred": {"center_rewards_coefficient": 0.01},
}
GRPO: dict[str, dict[str, Any]] = {
    # By default TRL 1.16 weighs k3 by the ratio to the old policy, which ours does not.
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "batch": {"loss_type": "grpo", "scale_rewards": "batch"},
}


# -- the batch -----------------------------------------------------------------------------------


def pairs() -> list[dict[str, list[int]]]:
    """Six prompts of 2 to 6 tokens with completions of 2 to 7."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(2, VOCAB, int(draw.integers(low, high + 1))).tolist()

    return [
        {"prompt_ids": ids(2, 6), "chosen_ids": ids(2, 7), "rejected_ids": ids(2, 7)}
        for _ in MARGINS
    ]


def labelled() -> list[dict[str, Any]]:
    """Both completions of every pair with labels, and the next prompt's as the mismatched one."""
    rows, given = [], pairs()
    for number, pair in enumerate(given):
        other = given[(number + 1) % len(given)]
        for side in ("chosen_ids", "rejected_ids"):
            row = {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[side]}
            rows.append({**row, "label": side == "chosen_ids", "KL_completion_ids": other[side]})
    return rows


def rollouts() -> list[dict[str, list[int]]]:
    """Two groups of four completions."""
    given = pairs()
    answers = [pair[side] for pair in given[:GROUP] for side in ("chosen_ids", "rejected_ids")]
    return [
        {"prompt_ids": given[row // GROUP]["prompt_ids"], "completion_ids": answer}
        for row, answer in enumerate(answers)
    ]


def weights(shapes: dict[str, tuple[int, ...]], seed: int, reach: int) -> dict[str, np.ndarray]:
    """Multiples of 1/128 up to reach/128, which float16 holds too; norms are near 1."""
    draw = np.random.default_rng(seed)
    return {
        name: (draw.integers(-reach, reach + 1, shape) / 128 + name.endswith("norm.weight")).astype(
            np.float32
        )
        for name, shape in sorted(shapes.items())
    }


# -- models and trainers -------------------------------------------------------------------------


class Models:
    """Policy and reference, made anew on every call."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        empty = LlamaForCausalLM(LlamaConfig(**CONFIG))
        shapes = {name: tuple(x.shape) for name, x in empty.state_dict().items()}
        self.reference_weights = weights(shapes, 1, 64)
        change = weights(shapes, 2, 12)
        self.policy_weights = {
            name: x + change[name] - name.endswith("norm.weight")
            for name, x in self.reference_weights.items()
        }

    def policy(self) -> Any:
        return self._model(self.policy_weights)

    def reference(self) -> Any:
        return self._model(self.reference_weights).eval()

    def scorer(self) -> Any:
        """The policy's trunk with a head of one score."""
        from transformers import LlamaConfig, LlamaForSequenceClassification

        model = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1))
        state = {name: x for name, x in self.policy_weights.items() if name != "lm_head.weight"}
        state |= weights({"score.weight": (1, CONFIG["hidden_size"])}, 3, 64)
        return _filled(model, state)

    def _model(self, state: dict[str, np.ndarray]) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return _filled(LlamaForCausalLM(LlamaConfig(**CONFIG)), state)


def _filled(model: Any, state: dict[str, np.ndarray]) -> Any:
    import torch

    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in state.items()})
    return model.float()


def tokenizer() -> Any:
    """Words "t0" to "t31"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    codec = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t2"))
    codec.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=codec, pad_token="t0", eos_token="t1", unk_token="t2"
    )


def texts() -> Any:
    """Pairs that trainers want to see when they are made; their batches are given to them."""
    from datasets import Dataset

    row = {"prompt": "t3 t4", "chosen": " t5 t6", "rejected": " t7 t8"}
    return Dataset.from_list([row, row])


class Trainers:
    """One trainer after the other, each on models of its own."""

    def __init__(self, folder: str) -> None:
        self.models = Models()
        self.common = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "per_device_train_batch_size": len(MARGINS),
        }

    def dpo(self, options: dict[str, Any]) -> dict[str, float]:
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=self.models.policy(),
            ref_model=self.models.reference(),
            args=DPOConfig(**{"beta": 0.1, "max_length": None, **self.common, **options}),
            train_dataset=texts(),
            processing_class=tokenizer(),
        )
        return _logged(trainer, trainer.data_collator(pairs()))

    def cpo(self, options: dict[str, Any]) -> dict[str, float]:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return self._labelled_batch(CPOTrainer, CPOConfig(**self.common, **options))

    def orpo(self, options: dict[str, Any]) -> dict[str, float]:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return self._labelled_batch(ORPOTrainer, ORPOConfig(**self.common, **options))

    def _labelled_batch(self, trainer_class: Any, config: Any) -> dict[str, float]:
        """Trainers whose batches hold labels, -100 at the prompt."""
        trainer = trainer_class(
            model=self.models.policy(),
            args=config,
            train_dataset=texts(),
            processing_class=tokenizer(),
        )
        return _logged(trainer, trainer.data_collator([_with_labels(pair) for pair in pairs()]))

    def kto(self, options: dict[str, Any]) -> dict[str, float]:
        from trl import KTOConfig, KTOTrainer

        trainer = KTOTrainer(
            model=self.models.policy(),
            ref_model=self.models.reference(),
            args=KTOConfig(**{"beta": 0.1, "max_length": None, **self.common, **options}),
            train_dataset=texts(),
            processing_class=tokenizer(),
        )
        return _logged(trainer, trainer.data_collator(labelled()))

    def reward(self, options: dict[str, Any]) -> dict[str, float]:
        from trl import RewardConfig, RewardTrainer

        rows = scored_pairs()
        trainer = RewardTrainer(
            model=self.models.scorer(),
            args=RewardConfig(**{"max_length": None, **self.common, **options}),
            train_dataset=texts(),
            processing_class=tokenizer(),
        )
        return _logged(trainer, trainer.data_collator(rows))

    def rollouts(self, kind: str, options: dict[str, Any], old: np.ndarray) -> dict[str, Any]:
        """Advantages of the fixed completions, and the loss against other old log-probs.

        Args:
          kind: "GRPO" or "RLOO".
          options: Of its config.
          old: Log-probs [N, T] of the policy that is said to have sampled.
        """
        import torch
        import trl
        from datasets import Dataset
        from trl.trainer.utils import add_fused_lm_head

        beta = options.get("beta", 0.0)
        settings = {"num_generations": GROUP, "max_completion_length": LONGEST, "temperature": 1.0}
        settings |= self.common | {"per_device_train_batch_size": len(REWARDS)} | options
        settings |= {"beta": 0.0}  # With it, a reference would be read from the hub.
        trainer = getattr(trl, f"{kind}Trainer")(
            model=self.models.policy(),
            reward_funcs=_given_rewards,
            args=getattr(trl, f"{kind}Config")(**settings),
            train_dataset=Dataset.from_list([{"prompt": "t3 t4"}] * len(REWARDS)),
            processing_class=tokenizer(),
        )
        trainer.beta, trainer.ref_model = beta, self.models.reference()
        add_fused_lm_head(trainer.ref_model)
        trainer.current_gradient_accumulation_steps = 1
        rows = rollouts()
        ids = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
        texts = [str(answer) for answer in ids[1]]
        found = {
            "GRPO": (*ids, None, texts, None, {}, None, None),
            "RLOO": (*ids, texts),
        }[kind]
        trainer._generate = lambda prompts: found
        batch = trainer._generate_and_score_completions([{"prompt": "t3 t4"} for _ in rows])
        if kind == "GRPO":
            batch["old_per_token_logps"] = torch.from_numpy(old)
        else:
            batch["old_logps"] = torch.from_numpy(old).sum(-1)
        logged = _logged(trainer, batch)
        return {**logged, "advantages": batch["advantages"].tolist()}


def _given_rewards(completions: list[str], **_: Any) -> list[float]:
    return REWARDS[: len(completions)]


def scored_pairs() -> list[dict[str, Any]]:
    """Whole conversations with margins, as a reward model reads them."""
    return [
        {
            "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
            "margin": margin,
        }
        for pair, margin in zip(pairs(), MARGINS, strict=True)
    ]


def _with_labels(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    prompt = pair["prompt_ids"]
    row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = pair[f"{side}_ids"]
        row[f"{side}_input_ids"] = prompt + answer
        row[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{side}_labels"] = [-100] * len(prompt) + answer
    return row


def _logged(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    """The loss of a batch and what the trainer logs of it."""
    loss = float(trainer.compute_loss(trainer.model, batch).detach())
    trainer.log({"loss": loss})
    numbers = trainer.state.log_history[-1]
    return {name: float(x) for name, x in numbers.items() if isinstance(x, int | float)}


# -- plain log-probs -----------------------------------------------------------------------------


def token_log_probs(model: Any, rows: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """What a model says of each completion after its prompt, a row at a time.

    Returns:
      `logps` float32 [N, LONGEST], 0 after the end; `prompt` [N], the sum over the prompt's tokens;
      `collision` [N], the sum over the completion of log sum_v p(v)^2.
    """
    import torch

    found = {
        "logps": np.zeros((len(rows), LONGEST), np.float32),
        "prompt": np.zeros(len(rows), np.float32),
        "collision": np.zeros(len(rows), np.float32),
    }
    for number, (prompt, answer) in enumerate(rows):
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens).logits[0, :-1].double(), -1)
        picked = log_p.gather(-1, tokens[0, 1:, None])[:, 0]
        start = len(prompt) - 1
        found["logps"][number, : len(answer)] = picked[start:].numpy()
        found["prompt"][number] = picked[:start].sum()
        found["collision"][number] = torch.logsumexp(2 * log_p[start:], -1).sum()
    return found


def scores(model: Any, rows: list[list[int]]) -> np.ndarray:
    """A reward model's scores of whole texts."""
    import torch

    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, 0].item() for ids in rows]
    return np.array(found, np.float32)


def measure() -> dict[str, Any]:
    """Everything that `golden/trl.npz` holds, with `results` as {trainer: {case: numbers}}."""
    with tempfile.TemporaryDirectory() as folder:
        made = Trainers(folder)
        arrays: dict[str, Any] = {}
        models = {"policy": made.models.policy().eval(), "reference": made.models.reference()}
        sides = {side: [(p["prompt_ids"], p[f"{side}_ids"]) for p in pairs()] for side in SIDES}
        sides["mismatched"] = [(r["prompt_ids"], r["KL_completion_ids"]) for r in labelled()]
        sides["rollouts"] = [(r["prompt_ids"], r["completion_ids"]) for r in rollouts()]
        for name, model in models.items():
            for side, rows in sides.items():
                for key, value in token_log_probs(model, rows).items():
                    arrays[f"{name}/{side}/{key}"] = value
            for key, value in getattr(made.models, f"{name}_weights").items():
                arrays[f"weights/{name}/{key}"] = value.astype(np.float16)
        scorer = made.models.scorer().eval()
        for side in SIDES:
            arrays[f"reward/{side}"] = scores(scorer, [r[f"{side}_ids"] for r in scored_pairs()])
        noise = np.random.default_rng(4).integers(-48, 49, (len(REWARDS), LONGEST)) / 128
        old = arrays["policy/rollouts/logps"]
        old = np.where(old != 0, old + noise, 0).astype(np.float32)
        arrays["old"] = old[:, : max(len(r["completion_ids"]) for r in rollouts())]
        results = {
            "dpo": {name: made.dpo(options) for name, options in DPO.items()},
            "cpo": {name: made.cpo(options) for name, options in CPO.items()},
            "orpo": {"orpo": made.orpo({"beta": 0.1})},
            "kto": {name: made.kto(options) for name, options in KTO.items()},
            "reward": {name: made.reward(options) for name, options in REWARD.items()},
            "grpo": {
                name: made.rollouts("GRPO", options, arrays["old"])
                for name, options in GRPO.items()
            },
            "rloo": {"rloo": made.rollouts("RLOO", {"beta": 0.05}, arrays["old"])},
        }
    return {**arrays, "results": results}


def main() -> None:
    """Writes the file."""
    from importlib.metadata import version

    found = measure()
    found["results"] = json.dumps(found["results"])
    found["pairs"] = json.dumps(pairs())
    found["versions"] = json.dumps(
        {name: version(name) for name in ("trl", "torch", "transformers")}
    )
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **found)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {found['versions']}")


if __name__ == "__main__":
    main()
