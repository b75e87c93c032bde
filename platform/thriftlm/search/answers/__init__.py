"""What a search says: the winner, how sure it is, and where it stands."""
