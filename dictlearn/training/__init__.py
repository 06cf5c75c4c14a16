"""Fitting one dictionary to a store: configuration, the loop, exact resume."""
