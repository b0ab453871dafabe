"""The DnD-Transformer system: image tokenizer, code models, sampling, scoring, reports."""
