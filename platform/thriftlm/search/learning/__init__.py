"""What is fitted to curves and speeds, and the searcher that decides by it."""
