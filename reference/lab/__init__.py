"""Training, data and measurements: what the evidence page needs, and nothing else."""
