"""Lists the data sets that LLaVA was trained on: files, sizes, sources and licences."""

import dataclasses
import difflib
import os

from llava_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class File:
    """Describes a file to download."""

    path: str
    """Path relative to the data folder; its last part is the name on the hub."""
    gigabytes: float | None
    repo: str = ""
    """Data set of the hub; "" for a file that is downloaded by hand."""
    url: str = ""
    """Address of a file that is downloaded by hand."""

    @property
    def origin(self) -> str:
        name = os.path.basename(self.path)
        return f"https://huggingface.co/datasets/{self.repo}/resolve/main/{name}" if self.repo else self.url

    @property
    def size(self) -> str:
        return f"{self.gigabytes:.3g} GB" if self.gigabytes else "size unknown"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Describes a folder of images, and the zip file that contains them."""

    path: str
    """Path relative to the data folder."""
    images: int
    """Number of images; a data set may use fewer."""
    archive: File
    licence: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """Describes a published data set."""

    about: str
    rows: int
    data: File
    image_root: str
    """Folder that the image paths of the data file are relative to."""
    folders: tuple[Folder, ...]
    licence: str
    approximate: bool = False
    """Whether `rows` is approximate."""

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
"""Published sets. Sizes are those of the hub and the publishers. Numbers of images are for information only, because a
folder is complete if it has the images that the data file names."""


def get(name: str) -> Published:
    """Returns the published set of that name. Raises UserError, with the names, if there is none."""
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETS)}"
        raise UserError(f"no published data set is called {name!r}; {hint}")
    return SETS[name]


def table() -> str:
    """Returns all sets with their files, sizes and licences, as text."""
    lines = []
    for name, published in SETS.items():
        data = published.data
        lines.append(f"{name}: {published.about}")
        lines.append(f"  {data.path}: {published.expected} rows, {data.size}, {published.licence}")
        for folder in published.folders:
            size = folder.archive.size + ("" if folder.archive.repo else " by hand")
            lines.append(f"  {folder.path}/: {folder.images:,} images, {size}, {folder.licence}")
    return "\n".join(lines)
