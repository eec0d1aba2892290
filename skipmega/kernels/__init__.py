"""How it runs: each operation's reference in plain torch, and the faster ones chosen at start."""
