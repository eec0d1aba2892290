"""Corpora as they lie on disk: files of many formats to documents, and how they are cut into shards."""
