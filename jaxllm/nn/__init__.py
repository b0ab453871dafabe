"""Layers only: attention, masks, rotary positions, norms, MLPs, embeddings, conv blocks.

Dimension letters, here and everywhere: B batch, T query length, S key length, N query heads,
K key/value heads, G = N/K, H head dim, D model dim, F MLP hidden, V vocabulary, L layers,
C code depth, E code dim.
"""
