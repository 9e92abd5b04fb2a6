"""Benchmarks: every operator against PyTorch eager, torch.compile and a copy of the same bytes."""
