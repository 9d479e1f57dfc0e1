"""Tasks: data, batches and metrics."""
