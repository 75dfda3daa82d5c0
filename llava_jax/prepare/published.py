"""The data sets that LLaVA was trained on: where they come from, what they hold, and whether a copy is complete.

What the Hugging Face hub has is downloaded. Images that only their own publishers give out are downloaded by hand; this
says which file goes where, unpacks it, and compares what is there with what the data file names.
"""

import dataclasses
import difflib
import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable

import tyro
from tqdm import tqdm

from llava_jax.cli import printable
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError, user_path
from llava_jax.prepare.archives import SUFFIXES, require_space, unpack

SHOWN = 3  # missing images of a folder that are named


@dataclasses.dataclass(frozen=True)
class File:
    """A file to download: from the hub if `repo` names the data set there, else by hand from `url`."""

    path: str  # relative to the data folder; the hub's name for it is the last part
    gigabytes: float | None
    repo: str = ""
    url: str = ""

    @property
    def origin(self) -> str:
        name = os.path.basename(self.path)
        return f"https://huggingface.co/datasets/{self.repo}/resolve/main/{name}" if self.repo else self.url

    @property
    def size(self) -> str:
        return f"{self.gigabytes:.3g} GB" if self.gigabytes else "size unknown"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of images, and the zip file that they come in."""

    path: str  # relative to the data folder
    images: int  # in the whole folder; a data set may use fewer
    archive: File
    licence: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A data file, the folder that its image paths are relative to, and the folders of images in it."""

    about: str
    rows: int
    data: File
    image_root: str
    folders: tuple[Folder, ...]
    licence: str
    approximate: bool = False  # `rows` is not known exactly

    @property
    def expected(self) -> str:
        return f"{'about ' * self.approximate}{self.rows:,}"


def _instruct(name: str, rows: int, gigabytes: float, about: str, approximate: bool = True) -> Published:
    return Published(
        about=about, rows=rows, approximate=approximate, licence=_CC_BY_OPENAI, image_root="coco/train2017",
        data=File(name, gigabytes, repo="liuhaotian/LLaVA-Instruct-150K"), folders=(_COCO,),
    )


_COCO = Folder(
    "coco/train2017", 118_287,
    File("coco/train2017.zip", 19.3, url="http://images.cocodataset.org/zips/train2017.zip"),
    "Flickr's terms of use (COCO does not own the images)",
)
_CC_BY_OPENAI = "CC BY 4.0, and OpenAI's terms of use"
_CC3M = "CC-3M's terms, BLIP's for its captions; images for research alone"
_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"

# Sizes as the hub and the publishers list them. Numbers of images are for information; a folder is complete if it has
# the images that the data file names.
SETS = {
    "cc3m_595k": Published(
        about="stage 1 of LLaVA 1.0: concept-balanced CC3M with its own captions",
        rows=595_375, approximate=True, licence=_CC3M, image_root="cc3m_595k/images",
        data=File("cc3m_595k/chat.json", 0.211, repo="liuhaotian/LLaVA-CC3M-Pretrain-595K"),
        folders=(Folder("cc3m_595k/images", 595_375,
                        File("cc3m_595k/images.zip", 6.46, repo="liuhaotian/LLaVA-CC3M-Pretrain-595K"), _CC3M),),
    ),
    "lcs_558k": Published(
        about="stage 1 of LLaVA 1.5: concept-balanced LAION, CC and SBU with BLIP captions",
        rows=558_128, licence=_CC3M, image_root="blip_laion_cc_sbu_558k",
        data=File("blip_laion_cc_sbu_558k.json", 0.181, repo="liuhaotian/LLaVA-Pretrain"),
        folders=(Folder("blip_laion_cc_sbu_558k", 558_128,
                        File("blip_laion_cc_sbu_558k/images.zip", 27.4, repo="liuhaotian/LLaVA-Pretrain"), _CC3M),),
    ),
    "instruct_150k": _instruct("llava_instruct_150k.json", 157_712, 0.229,
                               "stage 2 of LLaVA 1.0: the three parts below together", approximate=False),
    "conversation_58k": _instruct("conversation_58k.json", 56_681, 0.126, "part: conversations of several rounds"),
    "detail_23k": _instruct("detail_23k.json", 23_240, 0.0205, "part: detailed descriptions"),
    "complex_reasoning_77k": _instruct("complex_reasoning_77k.json", 76_643, 0.0796, "part: reasoning, one round"),
    "instruct_80k": _instruct("llava_instruct_80k.json", 80_000, 0.131,
                              "half conversations, half reasoning (LLaVA-Lightning)"),
    "mix665k": Published(
        about="stage 2 of LLaVA 1.5: instructions, academic VQA, captions, boxes and text alone",
        rows=665_298, licence=_CC_BY_OPENAI, image_root="",
        data=File("llava_v1_5_mix665k.json", 1.03, repo="liuhaotian/LLaVA-Instruct-150K"),
        folders=(
            _COCO,
            Folder("gqa/images", 148_854,
                   File("gqa/images.zip", 20.3, url="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
                   "CC BY 4.0 (unconfirmed)"),
            Folder("ocr_vqa/images", 207_572,
                   File("ocr_vqa/images.zip", None,
                        url="https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_"),
                   "covers of books, for research (unconfirmed)",
                   "That is a script: what it downloads goes into the folder, or zipped into that file. The data file "
                   "calls all images .jpg, the script saves some 900 as .gif or .png: --rename gives them their names"),
            Folder("textvqa/train_images", 25_119,
                   File("textvqa/train_val_images.zip", 6.6,
                        url="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
                   "CC BY 4.0 (unconfirmed)"),
            Folder("vg/VG_100K", 64_346, File("vg/images.zip", 9.2, url=f"{_GENOME}/images.zip"),
                   "CC BY 4.0 (unconfirmed)"),
            Folder("vg/VG_100K_2", 43_903, File("vg/images2.zip", 5.47, url=f"{_GENOME}/images2.zip"),
                   "CC BY 4.0 (unconfirmed)"),
        ),
    ),
}


def get(name: str) -> Published:
    """The published set of that name; UserError, with the names, if there is none."""
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETS)}"
        raise UserError(f"no published data set is called {name!r}; {hint}")
    return SETS[name]


def table() -> str:
    """All sets with their files, sizes and licences."""
    lines = []
    for name, published in SETS.items():
        data = published.data
        lines.append(f"{name}: {published.about}")
        lines.append(f"  {data.path}: {published.expected} rows, {data.size}, {published.licence}")
        for folder in published.folders:
            size = folder.archive.size + ("" if folder.archive.repo else " by hand")
            lines.append(f"  {folder.path}/: {folder.images:,} images, {size}, {folder.licence}")
    return "\n".join(lines)


class Copy:
    """A published set under the folder `to`, and what of it is there; `read` and `fetch` look.

    rows       of the data file
    problem    of the data file, one line, or ""
    named      the images that it names: their paths in each folder; None as long as there is no good data file
    missing    those of them that are not there
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
        """Reads the data file, and looks which of the images that it names are there."""
        path, published = self.at(self.published.data.path), self.published
        if not os.path.exists(path):
            self.problem = f"missing ({published.data.size}); it comes from {published.data.origin}"
            return
        try:
            source = open_source(path)
            self.rows = len(source)
            rows = (source.row(i) for i in tqdm(range(self.rows), path, disable=not sys.stderr.isatty()))
            self.named = _group(_named_images(rows), published)
        except UserError as error:
            self.problem = f"{error}; move the file away to fetch it again"
            return
        if self.rows != published.rows and not published.approximate:
            self.problem = f"{self.rows:,} rows instead of {published.expected}; move the file away to fetch it again"
        self.look()

    def look(self) -> None:
        self.missing = {folder: _not_in(self.at(folder), names) for folder, names in (self.named or {}).items()}

    def fetch(self) -> None:
        """Downloads what the hub has, unpacks the archives that are there, and leaves alone what is complete.

        A download that was cut off goes on. Raises UserError if the hub cannot be reached, and as `unpack` does.
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
                size = 2e9 * folder.archive.gigabytes  # images do not pack
                require_space(self.to, size, f"downloading and unpacking {archive}")
                download(folder.archive, self.to)
            if os.path.exists(archive):
                count = unpack(archive, self.at(folder.path), self.named[folder.path])
                print(f"{archive}: {count:,} images unpacked; the zip file is needed no more")
        self.look()

    def rename(self) -> None:
        """Gives files that differ from a missing image in the extension alone the name in the data file."""
        for folder, missing in self.missing.items():
            for old, new in _under_another_suffix(self.at(folder), missing).items():
                os.rename(self.at(os.path.join(folder, old)), self.at(os.path.join(folder, new)))
        self.look()

    def report(self) -> str:
        """What is there, what is missing, and how to get it."""
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
            some = ", ".join(missing[:SHOWN]) + ", ..." * (len(missing) > SHOWN)
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
        archive, lines = folder.archive, []
        place = self.at(archive.path)
        if os.path.exists(place):
            lines.append(f"  {place} is there: leave out --check to unpack it; if that is done, it lacks them")
        elif archive.repo:
            lines.append(f"  leave out --check to download and unpack {archive.origin} ({archive.size})")
        else:
            lines.append(f"  get {archive.origin} ({archive.size}) as {place}, then run this without --check")
        return lines + [f"  {folder.note}"] * bool(folder.note)


def download(file: File, to: str) -> None:
    """Downloads a file of the hub to its place under `to`, and goes on where an earlier run was stopped.

    Raises UserError, one line, if the hub cannot be reached or has no such file, or what came is damaged.
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
        # hf_hub_download would begin anew: it throws away what a stopped process has downloaded.
        with user_path(target):
            os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
            with open(part, "ab") as local:
                http_get(url, local, resume_size=local.tell(), expected_size=about.size, headers=build_hf_headers())
        if len(etag) == 64 and _sha256(part) != etag:
            os.unlink(part)
            raise UserError(f"{target}: the download was damaged on the way; run this again")
        os.replace(part, target)
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        why = f"the hub answers: {error}"
    except errors.HTTPError as error:  # of the HTTP library: no such host, no route, connection lost
        why = f"no network: {error}"
    else:
        return
    why = " ".join(why.split())
    advice = f"try again, or put the file to {target} yourself; --check works without a network"
    raise UserError(f"{file.origin} cannot be downloaded ({why:.150}): {advice}")


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named_images(rows: Iterable[dict]) -> Iterable[str]:
    for row in rows:
        image = row.get("image") if isinstance(row, dict) else None
        images = [image] if isinstance(image, str) else image or []
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise UserError(f"the data file names {image!r:.80} for an image")
        yield from images


def _group(images: Iterable[str], published: Published) -> dict[str, set[str]]:
    """Image paths by the published folder that they are in, relative to it; those in none by their own folder."""
    grouped, folders = defaultdict(set), [folder.path for folder in published.folders]
    for image in images:
        path = os.path.normpath(os.path.join(published.image_root, image))
        if os.path.isabs(path) or os.path.relpath(path, published.image_root or ".").startswith(".."):
            raise UserError(f"the data file names {image!r:.200}, which is outside the image folders")
        folder = next((folder for folder in folders if path.startswith(f"{folder}/")), os.path.dirname(path))
        grouped[folder].add(path.removeprefix(folder).removeprefix("/"))
    return dict(grouped)


def _not_in(folder: str, names: set[str]) -> set[str]:
    """Which of the names, some of them in subfolders, are not in the folder."""
    held = {sub: _list(os.path.join(folder, sub)) for sub in {os.path.dirname(name) for name in names}}
    return {name for name in names if os.path.basename(name) not in held[os.path.dirname(name)]}


def _list(folder: str) -> set[str]:
    with user_path(folder):  # a data file may name what no folder can be called
        try:
            return set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()


def _count_images(folder: str) -> int:
    return sum(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(folder) for name in names)


def _under_another_suffix(folder: str, missing: set[str]) -> dict[str, str]:
    """Images of the folder that differ from a missing one in the extension alone -> the name that is missing."""
    renamed, stems = {}, {os.path.splitext(name)[0]: name for name in missing}
    for sub in {os.path.dirname(name) for name in missing}:
        for name in sorted(_list(os.path.join(folder, sub))):
            stem, suffix = os.path.splitext(os.path.join(sub, name))
            if stem in stems and suffix.lower() in SUFFIXES:
                renamed[stem + suffix] = stems.pop(stem)
    return renamed


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Get one of the published data sets, or see what of it is missing and where that comes from.

    Without a name, lists the sets: files, sizes, licences. What the Hugging Face hub has is downloaded; archives of
    images that are put where this says are unpacked. Exit code 0 if the set is complete, 1 if not."""

    name: tyro.conf.Positional[str] = ""
    """the set: cc3m_595k, lcs_558k, instruct_150k, mix665k, ..."""
    to: str = "data"
    """folder to put it under; the recipes read data"""
    list: bool = False
    """list the sets and do nothing else"""
    check: bool = False
    """only look at what is there; needs no network"""
    rename: bool = False
    """give files that differ from a missing image in the extension alone the name in the data file"""

    def run(self) -> int:
        if self.list or not self.name:
            print(table())
            return 0
        copy = Copy(get(self.name), self.to)
        if self.check:
            copy.read()
        else:
            copy.fetch()
        if self.rename:
            copy.rename()
        print(printable(copy.report()))
        print(f"{self.name} is complete" if copy.complete else f"{self.name} is not complete")
        return 0 if copy.complete else 1
