"""Training runs: configurations, recipes and the loop."""
