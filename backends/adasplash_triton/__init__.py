"""The Triton backend: exact entmax attention on GPUs, in time that follows the support."""
