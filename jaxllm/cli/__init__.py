"""The jaxllm command."""
