"""A search against recorded runs, on a simulated cluster and clock."""
