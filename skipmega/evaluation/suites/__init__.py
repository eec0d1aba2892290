"""Suites that come with skipmega, and the scoring their tasks lack."""
