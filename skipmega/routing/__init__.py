"""Which tokens run which layer: route -> plan -> dispatch -> (run) -> combine."""
