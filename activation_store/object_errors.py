"""What goes wrong between us and an object store, in words: obstore's errors are a page long and told apart by text."""

from __future__ import annotations

import errno
import re

CREDENTIAL_SERVICES = ("169.254.169.254", "169.254.170.2", "/latest/api/token", "/computeMetadata/")
"""Who is asked for credentials when the environment has none."""


class Unreachable(OSError):
    """What went wrong, in words, as an OSError: the writer and the reader say what it means for the store."""

    def __init__(self, sentence: str):
        super().__init__(errno.EIO, sentence)


def is_final(problem: Exception) -> bool:
    """Whether asking again does not help. What looks like a server or a network that is away is not final."""
    from obstore.exceptions import GenericError

    if not isinstance(problem, (GenericError, ConnectionError, TimeoutError)):
        return True
    said = str(problem)
    refused = re.search(r"status code: 4(?!08|29)\d\d", said) is not None
    return refused or "builder error" in said or _asks_for_credentials(said)


def in_words(problem: Exception) -> Exception:
    """The error to raise for one of obstore's: itself if the caller knows what it means, else `Unreachable`."""
    from obstore.exceptions import (
        AlreadyExistsError,
        NotSupportedError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    said = str(problem)
    if "NoSuchBucket" in said:
        return Unreachable("there is no such bucket; make it first")
    if isinstance(problem, (FileNotFoundError, FileExistsError, AlreadyExistsError, PreconditionError)):
        return problem
    if isinstance(problem, (NotSupportedError, NotImplementedError)):
        return problem
    if _asks_for_credentials(said):
        return Unreachable(
            "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your object store uses"
        )
    if isinstance(problem, (PermissionDeniedError, UnauthenticatedError)) or "status code: 403" in said:
        return Unreachable(f"{_server(said)} refuses our credentials ({in_short(problem)})")
    return Unreachable(f"{_server(said)} cannot be reached or fails ({in_short(problem)})")


def in_short(problem: Exception) -> str:
    """What was answered, without the layers that it came through."""
    said = str(problem)
    for pattern in (r"<Code>(\w+)</Code>", r"status code: (\d+[^:\n]*)", r'(?:message|error): "([^"]+)"'):
        found = re.search(pattern, said)
        if found:
            return found.group(1).strip()
    if "TimedOut" in said:
        return "no answer in time"
    return (said.strip().splitlines() or [type(problem).__name__])[0].rstrip(".")


def _server(said: str) -> str:
    found = re.search(r"https?://[^/\s?]+", said)
    return f"the server {found.group()}" if found else "the server"


def _asks_for_credentials(said: str) -> bool:
    return any(service in said for service in CREDENTIAL_SERVICES)
