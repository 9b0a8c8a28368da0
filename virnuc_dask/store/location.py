"""The location of a store: a directory, or a prefix in an object store.

Only this module decides which of the two a path means.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.store.bucket import Bucket
from virnuc_dask.store.directory import Directory

_SCHEMES = ("s3", "s3a", "gs", "az")


def location_of(path: str | Path) -> Directory | Bucket:
    """Parse the path or URL of a store, without any access to it.

    Parameters
    ----------
    path : str or Path
        A path, which may begin with ``~``; a URL ``file:///path``; or the URL of an object store,
        ``s3://bucket/prefix``.

    Raises
    ------
    UsageError
        The URL is of another kind, or contains credentials.
    """
    text = str(path)
    if "://" not in text:
        if text.startswith(tuple(f"{scheme}:/" for scheme in _SCHEMES)):
            raise UsageError(
                f"{text}: a URL needs two slashes after the colon; pass it as a str, because a"
                " Path loses one"
            )
        return Directory(Path(expanded(path)))
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{text}: this file is on another host; write file:///path")
        return Directory(Path(unquote(parts.path)))
    return Bucket(_checked(text))


def _checked(url: str) -> str:
    """Check the URL of an object store, and remove needless slashes from it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        # The message repeats neither the URL nor the error: both may contain a secret.
        raise UsageError("a store's URL is a bucket and a prefix: s3://bucket/prefix") from None
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if "@" in bucket or ":" in bucket or parts.query or parts.fragment:
        # The message does not repeat the URL: it may contain a secret.
        raise UsageError(
            f"{parts.scheme}://…: a store's URL is only a bucket and a prefix; set credentials and"
            " endpoints in the environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
        )
    if parts.scheme not in _SCHEMES:
        raise UsageError(
            f"{url}: a store is in a directory, or in an object store, with a URL that begins"
            f" with {'://, '.join(_SCHEMES)}://"
        )
    if not bucket or {"", ".", ".."} & set(prefix.split("/")[: len(prefix)]):
        raise UsageError(f"{url}: write {parts.scheme}://bucket/prefix")
    return f"{parts.scheme}://{bucket}/{prefix}".rstrip("/")
