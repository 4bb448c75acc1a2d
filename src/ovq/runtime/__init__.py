"""What runs are made of, whatever they run: files, progress, worker processes, the environment."""
