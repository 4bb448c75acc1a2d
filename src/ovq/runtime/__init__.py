"""What all kinds of runs need: files, progress, worker processes, the environment."""
