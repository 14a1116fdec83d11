"""Builds the demo benchmark emoji-mmeb in the MMEB layout from three pinned npm packages."""

import base64
import functools
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
from PIL import Image

from vlm2vec.data.emoji import tasks
from vlm2vec.errors import UserError

DEMO_VERSION = "1.0"  # raise it whenever the output bytes change, so that older folders are rebuilt
Drawings = Mapping[str, Mapping[str, bytes]]
Zips = dict[str, dict[str, tasks.Image]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A pinned npm package of drawings: the folder to read, its licence and its SHA-512 (base64)."""

    vendor: str
    package: str
    version: str
    folder: str
    licence: str
    sha512: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives this package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def is_at(self, path: Path) -> bool:
        """Returns whether `path` is the tarball with the pinned checksum."""
        return path.is_file() and base64.b64encode(_digest(path, "sha512")).decode() == self.sha512


SOURCES = (
    Source("noto", "emoji-datasource-google", "16.0.0", "package/img/google/64/",
           "code MIT; images Apache-2.0 (Noto Emoji, Google)",
           "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    Source("twemoji", "emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/",
           "code MIT; images CC-BY-4.0 (Twemoji, Twitter and contributors)",
           "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="),
    Source("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/",
           "MIT (Fluent Emoji, Microsoft; packaged by LobeHub)",
           "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
)  # fmt: skip
_IDENTITY = {"name": "emoji-mmeb", "version": DEMO_VERSION, "sources": [asdict(source) for source in SOURCES]}
_REBUILD = "Delete the folder and run `vlm2vec data demo` to rebuild the demo benchmark."


def prepare_demo(cache_dir: Path, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Builds the demo benchmark below `cache_dir` and returns its root folder.

    A complete folder from an earlier call is returned immediately; an incomplete or outdated folder is rebuilt. Only
    the first call needs a network connection: the packages are kept in `<cache_dir>/npm`.

    Args:
        cache_dir: Parent folder of the benchmark and of the downloaded packages.
        force: Rebuild the benchmark even if it is complete.
        progress: Called with (stage, done, total) during the build.

    Raises:
        UserError: if npm is missing or fails, or `cache_dir` is not writable.
    """
    report = progress or (lambda *_: None)
    root = Path(cache_dir) / f"emoji-mmeb-{DEMO_VERSION}"
    if not force and _is_finished(root):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(prefix=".emoji-mmeb-", dir=root.parent))
    except OSError as error:
        raise UserError(f"{root.parent}: not writable ({error}); choose another folder") from error
    try:
        _fetch_sources(root.parent / "npm", report)
        _write_benchmark(build, *_read_sources(root.parent / "npm", report), report)
        _install(build, root)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    return root


def verify_demo(root: Path) -> None:
    """Checks every file of the demo benchmark against the checksum in its manifest.

    Raises:
        UserError: if the manifest cannot be read, or a file is missing or changed; the message names the file.
    """
    manifest = _read_manifest(root)
    if manifest is None:
        raise UserError(f"{root / 'manifest.json'}: no readable manifest. {_REBUILD}")
    for name, expected in manifest["files"].items():
        path = root / name
        if not path.is_file():
            raise UserError(f"{path}: the file is missing. {_REBUILD}")
        if _file_record(path) != expected:
            raise UserError(f"{path}: the file has changed (its checksum differs from the manifest). {_REBUILD}")


def held_out_names(root: Path) -> list[str]:
    """Returns the held-out names, which no training text may contain; other training sets filter by them."""
    try:
        names = json.loads((root / "names.json").read_text(encoding="utf-8"))["held_out"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{root / 'names.json'}: not a readable list of names ({error}). {_REBUILD}") from error
    return [str(name) for name in names]


def _read_manifest(root: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _is_finished(root: Path) -> bool:
    """Returns whether the folder has this version and all files have the expected size; contents are not read."""
    manifest = _read_manifest(root)
    if manifest is None or any(manifest.get(key) != value for key, value in _IDENTITY.items()):
        return False
    sizes = {root / name: expected["bytes"] for name, expected in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _install(build: Path, root: Path) -> None:
    """Moves the finished folder into place, or keeps the folder that another process finished in the meantime."""
    build.chmod(0o755)  # temporary folders are private to their owner, but the cache may be shared
    if root.exists():
        shutil.rmtree(root)
    try:
        build.replace(root)
    except OSError:
        if not _is_finished(root):
            raise


def _digest(path: Path, algorithm: str = "sha256") -> bytes:
    return hashlib.new(algorithm, path.read_bytes()).digest()


def _file_record(path: Path) -> dict[str, str | int]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path).hex()}


def _fetch_sources(folder: Path, report: Progress) -> None:
    """Downloads the missing tarballs; each is moved into place only after its checksum was verified."""
    missing = [source for source in SOURCES if not source.is_at(folder / source.tarball)]
    report("download", len(SOURCES) - len(missing), len(SOURCES))
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
        _npm_pack([f"{source.package}@{source.version}" for source in missing], Path(beside).resolve())
        for source in missing:
            if not source.is_at(Path(beside) / source.tarball):
                what = f"npm delivered {source.package}@{source.version} with another SHA-512 than the pinned package"
                raise UserError(f"{what}. Check which registry npm uses.")
            (Path(beside) / source.tarball).replace(folder / source.tarball)
    report("download", len(SOURCES), len(SOURCES))


def _npm_pack(specs: list[str], destination: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm is not on PATH; the emoji drawings of the demo benchmark are npm packages. "
            "Install Node.js with npm (nodejs.org or your system's package manager) and try again."
        )
    command = [npm, "pack", *specs, "--pack-destination", str(destination), "--json", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=destination, check=False, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"npm could not fetch {', '.join(specs)} ({error}). Check the network.") from error
    if done.returncode:
        # npm's last line only gives the path of its log.
        lines = [line for line in done.stderr.splitlines() if line.strip() and "complete log" not in line]
        last = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise UserError(f"npm could not fetch {', '.join(specs)} ({last}). Check the network and try again.")


def _read_sources(folder: Path, report: Progress) -> tuple[Drawings, list[dict[str, Any]]]:
    """Reads the drawings by vendor and code, and the emoji table, in one streaming pass over each tarball."""
    drawings: dict[str, dict[str, bytes]] = {source.vendor: {} for source in SOURCES}
    entries: list[dict[str, Any]] = []
    for done, source in enumerate(SOURCES, 1):
        with tarfile.open(folder / source.tarball, "r|gz") as archive:
            for member in archive:
                if member.name.startswith(source.folder) and (file := archive.extractfile(member)):
                    code = tasks.plain_code(Path(member.name).stem)
                    drawings[source.vendor][_mend_tone(code, source)] = file.read()
                elif member.name == "package/emoji.json" and (file := archive.extractfile(member)):
                    entries = json.load(file)
        report("read", done, len(SOURCES))
    return drawings, entries


def _mend_tone(code: str, source: Source) -> str:
    """Corrects the Fluent release, which swaps medium-light (1f3fc) and medium (1f3fd) except in technologists."""
    if source.vendor != "fluent" or "1f4bb" in code:
        return code
    return re.sub("1f3f[cd]", lambda tone: "1f3fd" if tone[0] == "1f3fc" else "1f3fc", code)


def _painter(drawings: Drawings) -> Callable[[tasks.Image], bytes]:
    """Returns a function that renders a planned image as PNG (RGB on white) and caches drawings and results."""
    lanczos, cell = Image.Resampling.LANCZOS, (tasks.CELL, tasks.CELL)

    @functools.cache
    def sprite(key: str) -> Image.Image:
        vendor, code = key.split("-", 1)
        with Image.open(io.BytesIO(drawings[vendor][code])) as image:
            # All drawings get the same size, so that the resolution does not reveal the vendor.
            return image.convert("RGBA").resize(cell, lanczos)

    @functools.cache
    def paint(image: tasks.Image) -> bytes:
        canvas = Image.new("RGB", (image.size, image.size), "white")
        for key, left, top, side in image.parts:
            part = sprite(key) if side == tasks.CELL else sprite(key).resize((side, side), lanczos)
            canvas.paste(part, (left, top), part)
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG", compress_type=zlib.Z_RLE)  # same size for flat drawings, in half the time
        return buffer.getvalue()

    return paint


def _write_benchmark(root: Path, drawings: Drawings, entries: list[dict[str, Any]], report: Progress) -> None:
    digests: dict[str, dict[str, str]] = {}
    for vendor, codes in drawings.items():
        digests[vendor] = {code: hashlib.sha256(image).hexdigest() for code, image in codes.items()}
    split = tasks.split_emoji(tasks.build_catalogue(entries, digests))
    subsets, zips = tasks.plan_subsets(split), Zips()
    for subset in subsets:
        name = f"train/images_zip/{subset.name}.zip" if subset.split == "train" else "eval/images.zip"
        zips.setdefault(name, {}).update(subset.images)
        _write_parquet(root, subset)
    _write_zips(root, zips, _painter(drawings), report)
    _write_json(root / "names.json", {side: sorted({d.name for d in drawn}) for side, drawn in split.items()})
    _write_records(root, subsets, zips)


def _write_zips(root: Path, zips: Zips, paint: Callable[[tasks.Image], bytes], report: Progress) -> None:
    number, total = itertools.count(1), sum(map(len, zips.values()))
    for name, images in zips.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(root / name, "w", zipfile.ZIP_STORED) as archive:
            for member, image in images.items():
                # Fixed timestamp and platform, so that the bytes are reproducible.
                info = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system, info.external_attr = 3, 0o644 << 16
                archive.writestr(info, paint(image))
                report("draw", next(number), total)


def _write_parquet(root: Path, subset: tasks.Subset) -> None:
    side, stem = ("train", "original") if subset.split == "train" else ("eval", "test")
    path = root / side / subset.name / f"{stem}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(subset.rows), path, compression="zstd")


def _write_records(root: Path, subsets: list[tasks.Subset], zips: Zips) -> None:
    """Writes the task table, the drawings in each image, and finally the manifest of all files."""
    lines = ["name: emoji-mmeb", "source: {train: train, eval: eval}", "tasks:"]
    for subset in subsets:
        if subset.split != "train":
            what = f"name: {subset.name}, meta_task: {subset.meta_task}, split: {subset.split}, metric: hit@1"
            size = f"num_queries: {len(subset.rows)}, num_candidates: {len(subset.rows[0]['tgt_text'])}"
            lines.append(f"  - {{{what}, scope: local, {size}}}")
    (root / "benchmark.yaml").write_text("\n".join([*lines, ""]), encoding="utf-8")
    shown = {m: [key for key, *_ in image.parts] for zipped in zips.values() for m, image in zipped.items()}
    _write_json(root / "pictures.json", shown)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    files = {path.relative_to(root).as_posix(): _file_record(path) for path in paths}
    _write_json(root / "manifest.json", _IDENTITY | {"files": files})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
