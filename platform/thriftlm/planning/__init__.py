"""What is known before anything runs: scaling laws. Needs neither torch nor Ray."""
