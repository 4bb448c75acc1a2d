"""What all kinds of runs need: files, progress, how much is said on the way."""
