r"""Writes the code cache of a trained tokenizer, in packed uint16 shards.

python train/extract_codes.py configs/images/CONFIG.py --tokenizer runs/TOKENIZER \
        [--crops one|flip|ten] [--workdir runs/codes]
"""

from jaxllm.cli.train import main
from jaxllm.images.extract import ExtractRun, extract_run

if __name__ == "__main__":
    main(ExtractRun, extract_run)
