"""Searching for settings with Optuna, from trlX's sweep files: `solotune sweep --config X.yml SCRIPT_OR_RECIPE`."""
