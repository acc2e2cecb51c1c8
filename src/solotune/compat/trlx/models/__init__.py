"""trlX's model modules."""
