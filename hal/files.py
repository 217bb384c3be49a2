"""Output files that are replaced as a whole, so that a failure does not change the older file; and the files that the
id of a checkpoint stands for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hal.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of the Hugging Face hub


def check_writable(option: str, path: Path) -> None:
    """Check that `replacing` will succeed, before the work whose result it writes. Missing folders are made.

    Args:
        option: the option that names the file on the command line, for the error.

    Raises:
        ConfigError: `path` cannot be written, or exists and is not a regular file.
    """
    try:
        temporary = _temporary(path)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary.unlink()
    except OSError as error:
        raise ConfigError(f"{option} cannot be written", got=f"{path}: {error.strerror or error}",
                          expected="the path of a file, in a folder that may be written") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: the path of a temporary file beside `path`, with the same suffix, for the block to write. It
    becomes `path` when the block ends, and is removed when the block raises.

    Raises:
        OSError: it cannot be written there.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        target = Path(os.path.realpath(path))  # a symbolic link stays one
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def local_checkpoint(name: str) -> str:
    """The directory of a checkpoint. It is `name`, unless this is no path and is an id of the Hugging Face hub
    ("owner/model") whose files are in the local cache. Nothing is downloaded."""
    if os.path.exists(name) or not HUB_ID.fullmatch(name):
        return name
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):  # it is not there, or is no such id
        return name


def _temporary(path: Path) -> Path:
    """A name beside the file that `path` leads to. Raises OSError where a rename to `path` would fail or do harm."""
    target = Path(os.path.realpath(path))
    if target.exists():
        # A rename needs no permission to write the file, and would replace a device such as /dev/null.
        if not target.is_file():
            raise OSError(None, "it is there, and is no regular file")
        if not os.access(target, os.W_OK):
            raise OSError(None, "it is there, and may not be written")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".hal-{os.getpid()}-{os.urandom(4).hex()}{target.suffix}")


__all__ = ["HUB_ID", "check_writable", "local_checkpoint", "replacing"]
