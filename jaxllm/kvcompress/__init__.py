"""HeadKV (arXiv:2410.19258): head importance, per-head budgets and a compressed KV cache."""
