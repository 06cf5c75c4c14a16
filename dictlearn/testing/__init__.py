"""Conformance suites, installed with the package so that a third-party dictionary can inherit them."""
