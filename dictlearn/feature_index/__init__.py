"""What each latent of a dictionary does over a whole store: built once, then read in milliseconds."""
