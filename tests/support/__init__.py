"""Shared by the tests: spawned worlds and small models."""
