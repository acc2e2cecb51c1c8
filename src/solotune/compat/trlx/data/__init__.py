"""trlX's configuration modules."""
