"""A search on Ray: Tune above, gangs of Ray Train workers below."""
