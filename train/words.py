"""Trains tokenizer and DnD-Transformer on rendered words, and reads what it draws.

python train/words.py configs/images/words.py --workdir runs/words
"""

from jaxllm.cli.train import main
from jaxllm.images.words import WordsRun, run_words

if __name__ == "__main__":
    main(WordsRun, run_words)
