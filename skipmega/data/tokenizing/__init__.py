"""Documents to tokens: pairs of .bin and .idx, whole or in shards."""
