"""Pairs to batches: samples, mixtures of sources, and the order of a run."""
