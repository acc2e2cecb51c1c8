"""Prompts, ratings, preference pairs, and the quickstart's assets."""
