"""Data sources, bundled samples and the step-indexed input pipeline."""
