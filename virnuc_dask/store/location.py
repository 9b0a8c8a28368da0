"""Where a store may be: a directory, or a prefix in an object store; no other module asks which."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.store.bucket import Bucket
from virnuc_dask.store.directory import Directory

_SCHEMES = ("s3", "s3a", "gs", "az")


def location_of(path: str | Path) -> Directory | Bucket:
    """The location that a user means. Looks at nothing that is there.

    Parameters
    ----------
    path : str or Path
        A path, which may begin with ``~``, ``file:///path``, or the URL of an object store:
        ``s3://bucket/prefix``.

    Raises
    ------
    UsageError
        A URL of another kind, or one that holds credentials.
    """
    text = str(path)
    if "://" not in text:
        if text.startswith(tuple(f"{scheme}:/" for scheme in _SCHEMES)):
            raise UsageError(f"{text}: a URL has two slashes there; as a Path it loses one")
        return Directory(Path(expanded(path)))
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{text}: another host's file; write file:///path")
        return Directory(Path(unquote(parts.path)))
    return Bucket(_checked(text))


def _checked(url: str) -> str:
    """The URL of a place in an object store, without what means nothing in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        # Not repeated here, nor its own words: they may hold a secret.
        raise UsageError("a store's URL is a bucket and a prefix: s3://bucket/prefix") from None
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if "@" in bucket or ":" in bucket or parts.query or parts.fragment:
        # Not repeated here: it may hold a secret.
        raise UsageError(
            f"{parts.scheme}://…: a store's URL is a bucket and a prefix; credentials and all else"
            " belong in the environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
        )
    if parts.scheme not in _SCHEMES:
        raise UsageError(
            f"{url}: a store may be in a directory, or at {'://, '.join(_SCHEMES)}:// in an object"
            " store"
        )
    if not bucket or {"", ".", ".."} & set(prefix.split("/")[: len(prefix)]):
        raise UsageError(f"{url}: write {parts.scheme}://bucket/prefix")
    return f"{parts.scheme}://{bucket}/{prefix}".rstrip("/")
