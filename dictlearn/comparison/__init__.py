"""Relating dictionaries to one another: which latents of two write alike, and whether they fire alike."""
