"""What a person or MLflow sees of a search: live table, report, pictures, tracking."""
