"""Re-examines a paper's central claim at CPU scale and writes docs/evidence/NAME.{md,json,png}.

python train/evidence.py dnd [--seeds 0 1 2] [--steps 500] [--out docs/evidence]
python train/evidence.py gdpo [--arms dpo_0.1 gdpo] [--steps 200] [--out docs/evidence]
python train/evidence.py headkv [--retrain True] [--budgets 2 8] [--out docs/evidence]
python train/evidence.py preference [--algorithms dpo ipo] [--steps 32] [--out docs/evidence]
"""

import sys
from pathlib import Path

from jaxllm.errors import InputError, run_command
from jaxllm.images.evidence import EvidenceRun, dnd_evidence
from jaxllm.kvcompress.evidence import headkv_evidence
from jaxllm.kvcompress.evidence_run import CacheEvidenceRun
from jaxllm.preference.evidence import OpinionEvidenceRun, gdpo_evidence
from jaxllm.preference.evidence_pairs import PairEvidenceRun, pair_evidence
from jaxllm.training.loop import use_compile_cache
from jaxllm.training.run_folder import override

EVIDENCE = {
    "dnd": (EvidenceRun, dnd_evidence),
    "gdpo": (OpinionEvidenceRun, gdpo_evidence),
    "headkv": (CacheEvidenceRun, headkv_evidence),
    "preference": (PairEvidenceRun, pair_evidence),
}


def main() -> int:
    """Parses NAME [--field value ...] [--out DIR] and runs the experiment."""
    name, *rest = sys.argv[1:] or [""]
    if name not in EVIDENCE:
        raise InputError(f"evidence {name!r} is not one of {', '.join(EVIDENCE)}")
    out = Path("docs/evidence")
    if "--out" in rest:
        place = rest.index("--out")
        if place + 1 == len(rest):
            raise InputError("--out needs a folder")
        out = Path(rest[place + 1])
        rest = rest[:place] + rest[place + 2 :]
    kind, run = EVIDENCE[name]
    use_compile_cache()
    result = run(override(kind(), rest), out)
    print(f"wrote {out}/{name}.md")
    if not result.get("passed", True):
        print(f"FAIL: a criterion of {out}/{name}.md is not met", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
