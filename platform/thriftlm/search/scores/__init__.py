"""What a trial is worth, beside the others."""
