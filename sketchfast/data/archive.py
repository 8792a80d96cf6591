"""Read-only access to a data set's files, whether they lie in a folder or in the `.zip` they came in."""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

#: What reading one file of a damaged archive or disk may raise; readers count the file and go on.
#: Among them what the standard library lets through: a size no memory holds, a header cut off.
READ_ERRORS = (
    OSError,
    EOFError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class LayoutError(ValueError):
    """The folder or archive does not hold the expected tree; the message shows that tree."""


def is_junk(name: str) -> bool:
    """Whether `name` is what file managers leave behind (`__MACOSX`, `.DS_Store`, `._x`, `Thumbs.db`)."""
    hidden = (part.startswith(".") and part != "." for part in name.split("/"))
    return any(hidden) or not {"__MACOSX", "Thumbs.db"}.isdisjoint(name.split("/"))


def layout_error(root: Path, expected: str, found: Iterable[str] = ()) -> LayoutError:
    """A LayoutError that shows the expected tree and, of what is there, the first few names."""
    names = list(found)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing usable"
    return LayoutError(f"root: {root} holds no such files.\nExpected:\n{expected}\nFound: {shown}")


def walk_files(folder: str | Path, above: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative POSIX name and entry of every file under `folder`, without junk; links to folders are not
    followed, and folders that may not be read are passed over."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not is_junk(entry.name)]
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, f"{above}{entry.name}/")
        elif entry.is_file():
            yield above + entry.name, entry


class Tree(ABC):
    """Files by relative POSIX name. `names` is sorted and free of junk; `read` returns a file's bytes."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.names: list[str] = sorted(n for n in names if not is_junk(n))

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file `name`; may raise any of READ_ERRORS."""

    def close(self) -> None:  # noqa: B027  (only an archive has something to release)
        """Releases the archive, where there is one."""

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FolderTree(Tree):
    """The files under a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, (name for name, _ in walk_files(path)))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class ZipTree(Tree):
    """The members of a zip archive, read in place (nothing is extracted)."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (ValueError, *READ_ERRORS) as error:
            raise ValueError(f"root: {path} is not a readable zip archive ({error})") from error
        super().__init__(path, (i.filename for i in self._zip.infolist() if not i.is_dir()))

    def read(self, name: str) -> bytes:
        return self._zip.read(name)

    def close(self) -> None:
        self._zip.close()


class SingleFileTree(Tree):
    """One file given by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path.name])

    def read(self, name: str) -> bytes:
        return self.path.read_bytes()


def existing_path(root: str | Path) -> Path:
    """`root` as a path; TypeError for another type, FileNotFoundError if nothing is there."""
    if not isinstance(root, (str, Path)):
        raise TypeError(f"root must be a str or Path, got {type(root).__name__}")
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"root: {path} does not exist")
    return path


def open_tree(root: str | Path, *, into_archive: bool = False) -> Tree:
    """The files of a folder, of a `.zip`, or a single file by itself.

    into_archive: a folder that holds one `.zip` and nothing else stands for that archive.
    """
    path = existing_path(root)
    if path.is_dir():
        tree = FolderTree(path)
        only = path / tree.names[0] if len(tree.names) == 1 else path
        return ZipTree(only) if into_archive and only.suffix.lower() == ".zip" else tree
    return ZipTree(path) if path.suffix.lower() == ".zip" else SingleFileTree(path)
