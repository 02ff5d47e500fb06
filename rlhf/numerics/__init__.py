"""Tensors only: log-probabilities, packed rows, masked statistics, the vocabulary head, what a CPU needs."""
