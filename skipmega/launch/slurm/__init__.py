"""SLURM: what a cluster is like, jobs written and submitted, and how far they are."""
