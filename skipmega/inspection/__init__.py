"""What a run's routers and losses did: its metrics file, the unigram baseline, and figures."""

from skipmega.inspection.entropy import count_dataset, count_tokens, unigram_entropy
from skipmega.inspection.figures import plot_density, plot_tokens_depth, plot_training
from skipmega.inspection.metrics import RunMetrics, read_metrics

__all__ = [
    "RunMetrics",
    "count_dataset",
    "count_tokens",
    "plot_density",
    "plot_tokens_depth",
    "plot_training",
    "read_metrics",
    "unigram_entropy",
]
