"""Comparing ways of spending compute honestly: each at its own best learning rate."""
