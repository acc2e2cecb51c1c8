"""The settings of each method: trlX's `method` section, one file a method."""
