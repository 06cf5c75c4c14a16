"""What a user types for a store: a path, or a URL (``s3://bucket/prefix``, ``gs://``, ``az://``, ``file:///``)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from activation_store.disk import Disk
from activation_store.errors import UserError
from activation_store.local_folder import LocalFolder
from activation_store.place import Place

OBJECT_STORE_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL: a path with ``://`` in it is nobody's."""
    return isinstance(location, str) and "://" in location


def open_place(location: str | os.PathLike[str] | Place, disk: Disk | None = None) -> Place:
    """The place called ``location``; nothing is read or made.

    Raises:
        UserError: a URL that nothing here understands, or whose library is not installed.
    """
    if isinstance(location, Place):
        return location
    if not is_url(location):
        return LocalFolder(Path(location), disk)
    url = str(location)
    scheme = url.partition("://")[0].lower()
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{url} names another machine; a local folder is file:///path/to/store, or just its path.")
        return LocalFolder(Path(unquote(parts.path)), disk)
    if scheme not in OBJECT_STORE_SCHEMES:
        known = ", ".join(f"{known}://" for known in ("s3", "gs", "az", "file"))
        raise UserError(f"{url} cannot be opened: nothing here understands {scheme}://; use a path, or {known}.")
    if not re.match(r"[a-z0-9]+://[^/]+/+[^/]", url, flags=re.IGNORECASE):
        raise UserError(f"{url} names no store: it should be {scheme}://bucket/name-of-the-store.")
    from activation_store.object_folder import ObjectFolder

    return ObjectFolder.of_url(url, disk)
