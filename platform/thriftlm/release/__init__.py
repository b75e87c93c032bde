"""What happens to a checkpoint: text out of it, Hugging Face folders. No Ray, no MLflow."""
