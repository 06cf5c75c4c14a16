"""The one error a person is meant to read."""


class UserError(Exception):
    """A mistake in what was asked for, in one sentence: what was wrong, and what to do. Exit code 2, no traceback."""
