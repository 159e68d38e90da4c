"""SAEs of a published release: one archive each, in SAELens' form, fetched once, checked by sha256, kept in the cache.

What there is, where it lies and what it hashes to stands in `releases.json`, which `masksae share PROFILE --release`
writes with the archives.
"""

import os
import zipfile
from pathlib import Path

from masksae.errors import ConfigError, SourceError, nearest
from masksae.files import cache_dir, ensure_writable, read_json

REGISTER = Path(__file__).with_name("releases.json")
PREFIX = "release:"
ADDRESS = "MASKSAE_RELEASES"
"""Environment variable with another address of the archives: a mirror, or a release that is not public yet."""


def archive_name(name: str) -> str:
    """File name of the archive of "PROFILE/SAE".

    >>> archive_name("overnight/kept-topk20-s100")
    'overnight-kept-topk20-s100.zip'
    """
    return name.replace("/", "-") + ".zip"


def unpack(name: str, target) -> Path:
    """Unpack the archive of `name`, "PROFILE/SAE", into the folder `target` and return it. Raises ConfigError for a
    name that no release has, SourceError where it cannot be had or is another file."""
    with zipfile.ZipFile(fetch(name)) as archive:
        archive.extractall(target)
    return Path(target)


def fetch(name: str) -> Path:
    """The archive of `name` in the cache: downloaded on first use, its sha256 compared on every. Raises as `unpack`."""
    import pooch
    from filelock import FileLock
    from requests import RequestException

    register = read_json(REGISTER)
    known = register["sha256"]
    if not known:
        raise ConfigError(
            f"{PREFIX}{name}: no SAEs are released yet. `masksae share overnight --release` makes the archives; "
            "a run's own SAEs are in masksae.Run(PROFILE).saes."
        )
    if name not in known:
        raise ConfigError(f"There is no {PREFIX}{name}.{nearest(name, known)} Released are {', '.join(sorted(known))}.")
    address = os.environ.get(ADDRESS) or register["address"]
    folder, file = ensure_writable(cache_dir("releases")), archive_name(name)
    store = pooch.create(folder, address.rstrip("/") + "/", registry={file: known[name]}, retry_if_failed=2)
    try:
        with FileLock(folder / f".{file}.lock"):
            return Path(store.fetch(file))
    except (RequestException, OSError) as error:
        raise SourceError(
            f"{file} cannot be fetched from {address}: {error}. Connect once, set {ADDRESS} to a mirror, or put the "
            f"file into {folder} by hand."
        ) from error
    except ValueError as error:
        if "hash" not in str(error):
            raise ConfigError(f"{ADDRESS} is no address of archives: {address!r} ({error}).") from error
        raise SourceError(
            f"{address} serves another {file} than was released: {error} Nothing was kept. Is it the release of this "
            "version of masksae?"
        ) from error
