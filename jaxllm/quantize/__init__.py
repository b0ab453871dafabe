"""Vector quantizers as pure functions with explicit state."""
