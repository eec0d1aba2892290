"""Checkpoints: logical tensors by name, complete or not there at all."""
