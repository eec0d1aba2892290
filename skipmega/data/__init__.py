"""From corpora to batches, one way: corpora, cleaning, tokenizing, pairs, order."""
