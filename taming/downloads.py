"""Downloads: files that are whole or absent, published weights, networks of torch hub."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name


def md5_hash(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal MD5 digest of a file."""
    return file_hash(path, "md5")


def file_hash(path: str | os.PathLike[str], name: str) -> str:
    """Return the hexadecimal digest of a file by the algorithm of a name, such as sha256."""
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, local_path: str | os.PathLike[str], chunk_size: int = 1 << 16) -> None:
    """Download a file with a progress bar; the target appears only once it is complete.

    Args:
        url: Source address (``https:``, ``file:``, ...).
        local_path: Target file; missing folders are created.
        chunk_size: Bytes per read.

    Raises:
        ConnectionError: The address cannot be reached; the message names both address and target,
            for a download by hand.
    """
    target = Path(local_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Saved beside the target and renamed, so that parallel processes never see a partial file.
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=target.name) as progress:
                while chunk := response.read(chunk_size):
                    file.write(chunk)
                    progress.update(len(chunk))
            # A connection that breaks looks like the end of the file.
            if file.tell() < total:
                raise ConnectionError(f"got {file.tell()} of {total} bytes")
        os.replace(part, target)
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"cannot download {url} ({error}); without a network connection, download it elsewhere "
            f"and copy it to {target}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


# Name -> address, file name and MD5 digest of published weights.
PUBLISHED = {
    "vgg_lpips": (
        "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
        "vgg.pth",
        "d507d7349b931f0638a25a48a722f98a",
    )
}


def get_ckpt_path(name: str, root: str | os.PathLike[str], check: bool = False) -> str:
    """Return the path of published weights in a folder, downloaded first if they are missing.

    Args:
        name: A key of `PUBLISHED`; ``"vgg_lpips"`` names the linear heads of LPIPS.
        root: Folder of the weights.
        check: Download again if an existing file has another MD5 digest.

    Raises:
        ConnectionError: The weights are missing and cannot be downloaded.
        ValueError: The name is unknown, or the download has another MD5 digest.
    """
    if name not in PUBLISHED:
        raise ValueError(f"published weights are {', '.join(PUBLISHED)}; got {name!r}")
    url, file_name, md5 = PUBLISHED[name]
    path = Path(root, file_name)
    if not path.is_file() or (check and md5_hash(path) != md5):
        download(url, path)
        if (found := md5_hash(path)) != md5:
            raise ValueError(f"{path} from {url} has md5 {found}, expected {md5}")
    return str(path)


def load_network(hub: str, entry: str, **options: Any) -> Any:
    """Load a network, or the preprocessing of its input, from a torch hub repository.

    Args:
        hub: ``owner/name`` on GitHub, or a folder that holds such a repository.
        entry: Name of a function in its ``hubconf.py``.
        **options: Arguments of that function.

    Raises:
        ConnectionError: The repository, or weights that it downloads, cannot be reached.
        ValueError: The folder is not a torch hub repository, or a package that it needs is missing.
    """
    import torch  # takes seconds, which the command line's --help does not need

    is_local = Path(hub).is_dir()
    if is_local and not Path(hub, "hubconf.py").is_file():
        raise ValueError(f"{hub} has no hubconf.py, so it is not a torch hub repository")
    source = "local" if is_local else "github"
    trusted: Any = True  # the user named it; torch declares str alone
    try:
        return torch.hub.load(hub, entry, source=source, trust_repo=trusted, **options)
    except ImportError as error:
        raise ValueError(f"the network {entry} of {hub} needs another package: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"the network {entry} of {hub} is neither a local folder nor available from torch hub "
            f"({error}); without a network connection, download https://github.com/{hub} elsewhere "
            "and name its folder with --hub"
        ) from error
