"""From documents to batches: tokenizer, preparation, checked data sets, blending, sampling."""
