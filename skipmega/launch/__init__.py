"""Starting processes: rank discovery, and what every command-line script shares."""
