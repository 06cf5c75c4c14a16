"""Numbers about one dictionary on one store, and on the language model it was trained on."""
