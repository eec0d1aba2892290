"""Where it runs: the grid of processes, DeepSpeed's view of it, and the pipeline driver."""
