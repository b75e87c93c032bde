"""What a search may try: fields, domains, constraints, and tables of recorded runs."""
