"""The stage between tokenizer and code model: every split of a data set as a code cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.data.images import ImageDataConfig, Split
from jaxllm.errors import InputError
from jaxllm.images.codes import Crops, extract_codes
from jaxllm.images.sample import Decoder


@dataclass(frozen=True)
class ExtractRun:
    """Which tokenizer, which images, how many views of each."""

    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    tokenizer: str = ""
    """Run folder of the tokenizer."""
    crops: Crops = "ten"
    """Views of each training image; the other splits have the centre crop only."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    batch_size: int = 64


def extract_run(run: ExtractRun, workdir: Path) -> None:
    """Writes `workdir/SPLIT` for every split and prints one line for each."""
    if not run.tokenizer:
        raise InputError("--tokenizer is needed: the run folder of a trained tokenizer")
    decoder = Decoder.load(Path(run.tokenizer))
    for split in run.splits:
        source = extract_codes(
            decoder.blueprint,
            decoder.params,
            decoder.extra,
            run.data,
            split,
            workdir / split,
            crops=run.crops if split == "train" else "one",
            batch_size=run.batch_size,
            tokenizer_run=Path(run.tokenizer),
        )
        print(f"{split}: {len(source)} images x {source.meta['crops']} crops in {workdir / split}")
