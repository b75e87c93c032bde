"""What happened: the journal, what it adds up to, and where a search lies."""
