"""Prepared pairs: what they hold, checked, told apart, read, shuffled and packed."""
