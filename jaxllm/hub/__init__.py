"""Weights in and out: safetensors, official PyTorch checkpoints."""
