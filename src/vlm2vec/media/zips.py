"""Zips whose index is a few arrays: forked processes share it, and the open file."""

from __future__ import annotations

import bisect
import os
import struct
import zipfile
import zlib
from itertools import accumulate

import numpy as np

HEADER = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and of the extra field
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1


class SharedZip:
    """The members of a zip. They are read by position, so that threads and forked processes can share one open file.

    Args:
        path: A zip whose members are stored or deflated, see `of`.
        found: Its members.
    """

    def __init__(self, path: str, found: dict[str, zipfile.ZipInfo]) -> None:
        names = sorted((name.encode(errors="surrogatepass"), name) for name in found)
        self._names = b"".join(encoded for encoded, _ in names)
        self._ends = np.array([0, *accumulate(len(encoded) for encoded, _ in names)], np.int64)
        members = [found[name] for _, name in names]
        facts = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self._facts = np.array(facts, np.int64).reshape(-1, 5)
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    @staticmethod
    def of(path: str) -> SharedZip | None:
        """A zip; None if it has members that are encrypted or compressed by a rare method.

        Raises:
            BadZipFile, OSError: as `zipfile.ZipFile`.
        """
        with zipfile.ZipFile(path) as archive:
            found = {member.filename: member for member in archive.infolist()}
        usual = all(m.compress_type in METHODS and not m.flag_bits & ENCRYPTED for m in found.values())
        return SharedZip(path, found) if usual else None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __contains__(self, name: str) -> bool:
        return self._place(name) is not None

    def namelist(self) -> list[str]:
        """Names of the members, sorted."""
        return [self._name(place).decode(errors="surrogatepass") for place in range(len(self._facts))]

    def read(self, name: str) -> bytes:
        """Content of a member.

        Raises:
            KeyError: if there is no such member.
            BadZipFile, zlib.error, EOFError: if the zip is damaged.
        """
        place = self._place(name)
        if place is None:
            raise KeyError(name)
        offset, packed, size, crc, method = self._facts[place].tolist()
        signature, *lengths = HEADER.unpack(self._bytes(offset, HEADER.size))
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name} has no header where the index says")
        content = self._bytes(offset + HEADER.size + sum(lengths), packed)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS, size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise zipfile.BadZipFile(f"{name} does not have its checksum")
        return content

    def _name(self, place: int) -> bytes:
        return self._names[self._ends[place] : self._ends[place + 1]]

    def _place(self, name: str) -> int | None:
        wanted = name.encode(errors="surrogatepass")
        place = bisect.bisect_left(range(len(self._facts)), wanted, key=self._name)
        return place if place < len(self._facts) and self._name(place) == wanted else None

    def _bytes(self, offset: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._file, size, offset)
            if not part:
                raise EOFError("it ends in the middle")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)
