"""`prepare fetch`: gets the data sets that LLaVA was trained on, and reports what a copy is missing.

Files of the Hugging Face hub are downloaded. Images that only their publishers distribute are downloaded by hand:
`fetch` reports which file goes where, unpacks it, and compares the images with those that the data file names.
"""

import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterable

import tyro
from tqdm import tqdm

from llava_jax.cli import Flag, printable
from llava_jax.data.fields import VIDEOS
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError, user_path
from llava_jax.files import sha256_of
from llava_jax.prepare.archives import SUFFIXES, require_space, unpack
from llava_jax.prepare.published import File, Folder, Published, get, table

SHOWN_MISSING = 3
"""Number of missing images that are named, for every folder."""


class Copy:
    """A copy of a published set in the folder `to`. `read` and `fetch` fill in its attributes.

    Attributes:
      rows: Number of rows of the data file.
      problem: Problem of the data file in one line, or "".
      named: Paths of the images that the data file names, by folder; None without a good data file.
      missing: Named images that do not exist, by folder.
    """

    def __init__(self, published: Published, to: str):
        self.published, self.to = published, to
        self.rows, self.problem = 0, ""
        self.named: dict[str, set[str]] | None = None
        self.missing: dict[str, set[str]] = {}

    @property
    def complete(self) -> bool:
        return self.named is not None and not self.problem and not any(self.missing.values())

    def at(self, path: str) -> str:
        return os.path.join(self.to, path)

    def read(self) -> None:
        """Reads the data file, and finds which of the images that it names are missing."""
        path, published = self.at(self.published.data.path), self.published
        if not os.path.exists(path):
            self.problem = f"missing ({published.data.size}); it comes from {published.data.origin}"
            return
        try:
            source = open_source(path)
            self.rows = len(source)
            rows = (source.row(i) for i in tqdm(range(self.rows), path, disable=None))
            self.named = _group(_named_images(rows), published)
        except UserError as error:
            self.problem = f"{error}; move the file away to fetch it again"
            return
        if self.rows != published.rows and not published.approximate:
            self.problem = f"{self.rows:,} rows instead of {published.expected}; move the file away to fetch it again"
        self.update()

    def update(self) -> None:
        """Finds again which images are missing."""
        self.missing = {folder: _not_in(self.at(folder), names) for folder, names in (self.named or {}).items()}

    def fetch(self) -> None:
        """Downloads files of the hub and unpacks archives, unless their content is complete.

        An interrupted download is continued. Raises UserError if the hub cannot be reached, and as `unpack` does.
        """
        data = self.published.data
        if not os.path.exists(self.at(data.path)):
            download(data, self.to)
        self.read()
        for folder in self.published.folders:
            archive = self.at(folder.archive.path)
            if not self.missing.get(folder.path):
                continue
            if folder.archive.repo and not os.path.exists(archive):
                size = 2e9 * folder.archive.gigabytes  # images are hardly compressed
                require_space(self.to, size, f"downloading and unpacking {archive}")
                download(folder.archive, self.to)
            if os.path.exists(archive):
                count = unpack(archive, self.at(folder.path), self.named[folder.path])
                print(f"{archive}: {count:,} images unpacked; the zip file is no longer needed")
        self.update()

    def rename(self) -> None:
        """Renames files that differ from a missing image only in the extension."""
        for folder, missing in self.missing.items():
            for old, new in _under_another_suffix(self.at(folder), missing).items():
                os.rename(self.at(os.path.join(folder, old)), self.at(os.path.join(folder, new)))
        self.update()

    def report(self) -> str:
        """Returns what exists, what is missing, and how to get it, as text."""
        rows = f"{self.rows:,} rows" + f", expected {self.published.expected}" * self.published.approximate
        lines = [f"{self.at(self.published.data.path)}: {self.problem or rows}"]
        folders: dict[str, Folder | None] = {folder.path: folder for folder in self.published.folders}
        for path in sorted(self.missing):
            folders.setdefault(path, None)
        for path, folder in folders.items():
            lines += self._report_folder(path, folder)
        return "\n".join(lines)

    def _report_folder(self, path: str, folder: Folder | None) -> list[str]:
        count, missing = _count_images(self.at(path)), sorted(self.missing.get(path, ()))
        line = f"{self.at(path)}: {count:,} images" + (f" of about {folder.images:,}" if folder else "")
        if self.named is not None:
            named = len(self.named.get(path, ()))
            if not missing:
                return [f"{line}; all {named:,} that are used are there"]
            some = ", ".join(missing[:SHOWN_MISSING]) + ", ..." * (len(missing) > SHOWN_MISSING)
            line += f"; {len(missing):,} of the {named:,} that are used are missing: {some}"
        lines, renamed = [line], _under_another_suffix(self.at(path), set(missing))
        if renamed:
            old, new = next(iter(renamed.items()))
            lines.append(f"  {len(renamed):,} of them are there under another extension, {old} for {new}: "
                         "add --rename; what an image is is told from its content")
        if folder and (len(missing) > len(renamed) or not count):
            lines += self._advise(folder)
        return lines

    def _advise(self, folder: Folder) -> list[str]:
        archive, path = folder.archive, self.at(folder.archive.path)
        if os.path.exists(path):
            line = f"  {path} is there: leave out --check to unpack it; if that is done, it lacks them"
        elif archive.repo:
            line = f"  leave out --check to download and unpack {archive.origin} ({archive.size})"
        else:
            line = f"  get {archive.origin} ({archive.size}) as {path}, then run this without --check"
        return [line, *[f"  {folder.note}"] * bool(folder.note)]


def download(file: File, to: str) -> None:
    """Downloads a file of the hub to its path in the folder `to`. An interrupted download is continued.

    Raises UserError if the hub cannot be reached or has no such file, or if the download is damaged.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    target = os.path.join(to, file.path)
    try:
        url = hf_hub_url(file.repo, os.path.basename(target), repo_type="dataset")
        about = get_hf_file_metadata(url)
        etag = about.etag or ""
        part = f"{target}.{etag[:8]}.part"
        # Not hf_hub_download, because it discards what an interrupted process has downloaded.
        with user_path(target):
            os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
            with open(part, "ab") as local:
                http_get(url, local, resume_size=local.tell(), expected_size=about.size, headers=build_hf_headers())
        if len(etag) == 64 and sha256_of(part) != etag:
            os.unlink(part)
            raise UserError(f"{target}: the download was damaged on the way; run this again")
        os.replace(part, target)
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        why = f"the hub answers: {error}"
    except errors.HTTPError as error:  # no such host, no route, connection lost
        why = f"no network: {error}"
    else:
        return
    why = " ".join(why.split())
    advice = f"try again, or put the file to {target} yourself; --check works without a network"
    raise UserError(f"{file.origin} cannot be downloaded ({why:.150}): {advice}")


def _named_images(rows: Iterable[dict]) -> Iterable[str]:
    for row in rows:
        row = row if isinstance(row, dict) else {}
        if any(row.get(key) for key in VIDEOS):
            raise UserError("the data file names a video; the published sets have images alone")
        image = row.get("image")
        images = [image] if isinstance(image, str) else image or []
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise UserError(f"the data file names {image!r:.80} for an image")
        yield from images


def _group(images: Iterable[str], published: Published) -> dict[str, set[str]]:
    """Returns image paths relative to their published folder, by folder; other images by their own folder."""
    grouped, folders = defaultdict(set), [folder.path for folder in published.folders]
    for image in images:
        path = os.path.normpath(os.path.join(published.image_root, image))
        if os.path.isabs(path) or os.path.relpath(path, published.image_root or ".").startswith(".."):
            raise UserError(f"the data file names {image!r:.200}, which is outside the image folders")
        folder = next((folder for folder in folders if path.startswith(f"{folder}/")), os.path.dirname(path))
        grouped[folder].add(path.removeprefix(folder).removeprefix("/"))
    return dict(grouped)


def _not_in(folder: str, names: set[str]) -> set[str]:
    """Returns the names, which may have subfolders, that do not exist in the folder."""
    found = {sub: _list(os.path.join(folder, sub)) for sub in {os.path.dirname(name) for name in names}}
    return {name for name in names if os.path.basename(name) not in found[os.path.dirname(name)]}


def _list(folder: str) -> set[str]:
    with user_path(folder):  # a data file may name what no folder can be called
        try:
            return set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()


def _count_images(folder: str) -> int:
    return sum(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(folder) for name in names)


def _under_another_suffix(folder: str, missing: set[str]) -> dict[str, str]:
    """Returns images of the folder that differ from a missing one only in the extension, with the missing name."""
    renamed, stems = {}, {os.path.splitext(name)[0]: name for name in missing}
    for sub in {os.path.dirname(name) for name in missing}:
        for name in sorted(_list(os.path.join(folder, sub))):
            stem, suffix = os.path.splitext(os.path.join(sub, name))
            if stem in stems and suffix.lower() in SUFFIXES:
                renamed[stem + suffix] = stems.pop(stem)
    return renamed


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Gets one of the published data sets, or reports what is missing and where to get it.

    Without a name, lists the sets: files, sizes, licences. Files of the Hugging Face hub are downloaded. Archives of
    images that were downloaded by hand are unpacked. The exit code is 0 if the set is complete, 1 if not.
    """

    name: tyro.conf.Positional[str] = ""
    """Name of the set: cc3m_595k, lcs_558k, instruct_150k, mix665k, ..."""
    out: str = "data"
    """Folder for the set. The recipes read from data."""
    list: Flag = False
    """Whether to list the sets and do nothing else."""
    check: Flag = False
    """Whether to report missing files and do nothing else; needs no network."""
    rename: Flag = False
    """Whether to rename files that differ from a missing image only in the extension."""

    def run(self) -> int:
        if self.list or not self.name:
            print(table())
            return 0
        copy = Copy(get(self.name), self.out)
        if self.check:
            copy.read()
        else:
            copy.fetch()
        if self.rename:
            copy.rename()
        print(printable(copy.report()))
        print(f"{self.name} is complete" if copy.complete else f"{self.name} is not complete")
        return 0 if copy.complete else 1
