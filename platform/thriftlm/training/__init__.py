"""Real training of one run: data, strategies, loop, checkpoints. Knows neither Ray nor MLflow."""
