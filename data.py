"""The public data sets of phrases and masks on aerial images, one's own in the simplest form, and a toy set that is drawn.

    RRSIS-D     ROOT/rrsisd/refs(unc).p, rrsisd/instances.json (COCO run lengths), images/rrsisd/JPEGImages/*.jpg
    RefSegRS    ROOT/output_phrase_{train,val,test}.txt of "<id> <phrase>", images/<id>.tif, masks/<id>.tif
    RISBench    ROOT/img_rgb/*.png with output_phrase_{split}.txt and mask/*.png, or with *.jsonl of
                {split, file_name, sent, segmentation: {size, counts}}
    own         ROOT/phrases.jsonl of {image, mask, phrase, split}, images/, masks/ (a pixel above 0 belongs to the mask)

    python data.py check DIR [--dataset NAME]              opens everything, lists each defect with its file
    python data.py download rrsisd|refsegrs DIR            fetches, verifies, unpacks, checks
    python data.py toy DIR [--train N --val N --test N --seed S]

The toy set needs no download: scenes of 256 x 256 pixels in exactly RRSIS-D's files, with several objects of its
categories, most of them beside others of the same class, and phrases that single one out by class, colour, size, place
or neighbour.

Files from elsewhere are not trusted: pickles hold plain data or are refused, names stay inside ROOT, sizes are bounded.

Shapes: B images, k phrases an image, N = B k, S side of the model's input, H W pixels of the stored image.
This file needs torch, numpy, pillow, tokenizers (which brings huggingface_hub) and tqdm, and works when copied alone.
"""
import argparse
import hashlib
import io
import json
import math
import os
import pickle
import random
import reprlib
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from tqdm import tqdm

CATEGORIES = ("Expressway-Service-area Expressway-toll-station airplane airport baseballfield basketballcourt bridge "
              "chimney dam golffield groundtrackfield harbor overpass ship stadium storagetank tenniscourt trainstation "
              "vehicle windmill").split()
SPLITS = ("train", "val", "test")
PUBLISHED = {"rrsisd": dict(train=12181, val=1740, test=3481), "refsegrs": dict(train=2172, val=431, test=1817),
             "risbench": dict(train=26300, val=10013, test=16159)}                                 # phrases


# ------------------------------------------------------------------------------------------------------- file formats

class PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, strings and numbers. Anything else in a pickle names a function to call: refused. Written in
    Python, because the one in C reserves as much memory as a few bytes of a file ask for. Tuples (nested, they take for ever to
    hash), frozen sets and byte arrays are refused too."""
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in (
        pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET, pickle.BYTEARRAY8)}

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def read_pickle(path):
    """Plain data from a pickle that nobody vouches for. Raises ValueError naming the file."""
    content = Path(path).read_bytes()
    try:
        return PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:                                      # a file made to do harm can raise anything
        raise ValueError(f"{path} is not a pickle of plain data: {error!r}. Do not load it otherwise; fetch it again.") from error


IMAGES = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")     # Pillow would hand others to other programs


def to_rgb(image):
    """PIL image of any mode -> RGB. Alpha is dropped; grey of more than 8 bits is stretched from the 2nd to the 98th
    percentile, without values that are not numbers or that a GeoTIFF declares to be no data."""
    if image.mode.startswith(("I", "F")):
        values, missing = np.array(image, dtype=np.float32), getattr(image, "tag_v2", {}).get(42113)
        there = np.isfinite(values) & (values != np.float32(missing.strip(" \0")) if missing else True)
        known = values[there] if there.any() else np.zeros(1)
        low, high = np.percentile(known, (2, 98))
        low, high = (low, high) if low < high else (known.min(), known.max())      # most of it is one value: night, radar
        values = np.where(there, np.clip((values - low) * (255 / max(high - low, 1e-9)), 0, 255), 0)
        image = Image.fromarray(values.round().astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path, convert=to_rgb):
    """An image file -> PIL image, RGB, or what else `convert` makes of it. Raises FileNotFoundError, or ValueError naming the
    file."""
    try:
        with Image.open(path, formats=IMAGES) as image:
            return convert(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to open safely ({error}). Cut it into tiles.") from error
    except Exception as error:                                      # each format has its own kinds
        raise ValueError(f"{path} is not a readable image ({error}). Fetch it again, take it out, or convert it (TIFFs: "
                         "gdal_translate -ot Byte).") from error


def image_tensor(image, side):
    """PIL image -> (3, side, side) uint8, bilinear; the aspect ratio is not kept."""
    return torch.from_numpy(np.array(image.resize((side, side), Image.BILINEAR))).permute(2, 0, 1)


def resize_mask(mask, height, width):
    """(H, W) bool -> (height, width) bool, nearest."""
    return np.array(Image.fromarray(mask).resize((width, height), Image.NEAREST))


MAX_PIXELS = 2**27   # of a mask: more is damage, or made to fill the memory


def decode_rle(counts, height, width):
    """COCO's compressed run lengths (a string) -> mask (height, width) bool.

    Runs of 0s and 1s alternate down the columns. Each is a number in base 32, low digit first, one character a digit
    (48 + digit, + 32 while more follow); from the fourth on it is the difference to the run two before.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"no mask has {height} x {width} pixels")
    runs, place = [], 0
    while place < len(counts):
        value, shift, digit = 0, 0, 32
        while digit & 32:
            if place == len(counts) or shift > 30 or not 0 <= (digit := ord(counts[place]) - 48) < 64:
                raise ValueError(f"run lengths break off or hold a foreign character at place {place}")
            value |= (digit & 31) << shift
            shift, place = shift + 5, place + 1
        if digit & 16:                                              # the sign
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths add up to {sum(runs)}, not to {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encode_rle(mask):
    """(H, W) bool -> COCO's compressed run lengths; the inverse of decode_rle."""
    edges = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False))
    runs = np.diff(edges, prepend=0, append=mask.size).tolist()
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return text


def overlap(a, b):
    """IoU of two masks; 1 if both are empty."""
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def clean_mask(mask):
    """(H, W) bool -> the same after a 5 x 5 median: without the on-off noise around the edges of RRSIS-D's stored masks. Things
    of two or three pixels, of which the median leaves less than half, stay as they are."""
    ys, xs = np.nonzero(mask)
    cleaned = np.zeros_like(mask)
    if len(ys):
        box = slice(max(0, ys.min() - 3), ys.max() + 4), slice(max(0, xs.min() - 3), xs.max() + 4)
        cleaned[box] = np.asarray(Image.fromarray(mask[box]).convert("L").filter(ImageFilter.MedianFilter(5))) > 127
    return cleaned if overlap(mask, cleaned) > 0.5 else mask


# ------------------------------------------------------------------------------------------------------------ readers

@dataclass(frozen=True)
class Ref:
    """One row: what the phrase names in one image."""
    ref_id: object   # a number, or "split:line" or "file:line" where the data set numbers nothing
    split: str
    image: Path
    phrase: str
    category: str    # "-" where the data set has none
    mask: object     # Path of a grey image, or (height, width, run lengths)


def says_something(phrase):
    return any(character.isalnum() for character in phrase)


def inside(folder, name):
    """The file `name` in `folder`. Raises ValueError for a name that leads elsewhere."""
    if Path(name).anchor or ".." in Path(name).parts:
        raise ValueError(f"the file name {name!r} leaves the data folder")
    return folder / name


def run_lengths(segmentation):
    return *segmentation["size"], segmentation["counts"]


def read_rrsisd(root):
    instances = json.loads((root / "rrsisd" / "instances.json").read_text("utf-8"))
    category = {row["id"]: row["name"] for row in instances["categories"]}
    mask = {row["id"]: row["segmentation"][0] for row in instances["annotations"]}
    return [Ref(row["ref_id"], row["split"], inside(root / "images" / "rrsisd" / "JPEGImages", row["file_name"]),
                row["sentences"][0]["sent"].strip(), category[row["category_id"]], run_lengths(mask[row["ann_id"]]))
            for row in read_pickle(root / "rrsisd" / "refs(unc).p")]


def lines(path):
    """(number, text) of each line that is not blank."""
    return [(i, text.strip()) for i, text in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if text.strip()]


def read_phrase_files(root, images, masks, suffix):
    """output_phrase_{split}.txt, each line an image's name and a phrase about it."""
    refs = []
    for split in SPLITS:
        for number, text in lines(root / f"output_phrase_{split}.txt"):
            name, _, phrase = text.partition(" ")
            name = name if Path(name).suffix else name + suffix
            image, mask = inside(root / images, name), inside(root / masks, name)
            refs.append(Ref(f"{split}:{number}", split, image, phrase.strip(), "-", mask))
    return refs


def read_json_lines(path, images):
    """Rows of {image, mask, phrase, split}, or RISBench's {file_name, segmentation, sent, split}."""
    refs = []
    for number, text in lines(path):
        try:
            row = json.loads(text)
            if "segmentation" in row:
                refs.append(Ref(f"{path.stem}:{number}", row["split"], inside(images, row["file_name"]), row["sent"].strip(),
                                "-", run_lengths(row["segmentation"])))
            else:
                refs.append(Ref(f"{path.stem}:{number}", row["split"], inside(images, row["image"]), row["phrase"].strip(),
                                row.get("category", "-"), inside(path.parent / "masks", row["mask"])))
        except Exception as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise ValueError(f"{path}, line {number} {what}; a row is {{image, mask, phrase, split}}, RISBench's {{file_name, "
                             "segmentation, sent, split}") from error
    return refs


def read_risbench(root):
    refs = [ref for path in sorted(root.glob("*.jsonl")) for ref in read_json_lines(path, root / "img_rgb")]
    return refs or read_phrase_files(root, "img_rgb", "mask", ".png")


FORMATS = {   # name -> the file or folder that tells it, in this order; its reader
    "rrsisd": ("rrsisd", read_rrsisd),
    "own": ("phrases.jsonl", lambda root: read_json_lines(root / "phrases.jsonl", root / "images")),
    "risbench": ("img_rgb", read_risbench),
    "refsegrs": ("output_phrase_train.txt", lambda root: read_phrase_files(root, "images", "masks", ".tif")),
}


def read_refs(root, dataset=None):
    """-> the data set's name, and every row of every split. `dataset` is a name in FORMATS; None tells it from the folder.
    Raises FileNotFoundError or ValueError naming the file and the cure."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder, seen from {Path.cwd()}. Name the data's folder (train.py, evaluate.py: "
                                "--data); `python data.py download` fetches a data set, `train.py --sam tiny` draws its own.")
    dataset = dataset or next((name for name, (mark, _) in FORMATS.items() if (root / mark).exists()), None)
    if dataset is None:
        marks = ", ".join(mark for mark, _ in FORMATS.values())
        raise FileNotFoundError(f"{root} holds no data set: none of {marks} is there. `python data.py download rrsisd {root}` "
                                "fetches one, one's own needs phrases.jsonl, images/ and masks/, `train.py --sam tiny` draws its "
                                "own.")
    try:
        refs = FORMATS[dataset][1](root)
        for ref in refs:
            texts = all(type(value) is str for value in (ref.split, ref.phrase, ref.category)) and type(ref.ref_id) in (int, str)
            if not texts or ref.split not in SPLITS or not (
                    isinstance(ref.mask, Path) or [type(value) for value in ref.mask] == [int, int, str]):
                raise ValueError(f"a row of {ref.image.name}, {reprlib.repr(ref.ref_id)}, of split {reprlib.repr(ref.split)}, "
                                 f"holds what it should not; splits are {', '.join(SPLITS)}")
        return dataset, refs
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: the head of data.py lists what {dataset} consists of. Fetch it, "
                                "or name the format with --dataset.") from error
    except Exception as error:                                      # whatever a damaged list holds
        what = error if type(error) is ValueError else repr(error)
        raise ValueError(f"{root}: the lists of {dataset} are damaged or do not fit together: {what}. Repair them or fetch "
                         "them again.") from error


def above_zero(image):
    """A stored mask, of any mode -> (H, W) bool."""
    return np.asarray(image) > 0 if image.mode.startswith(("I", "F")) else np.asarray(image.convert("RGB")).any(-1)


def read_mask(ref):
    """The stored mask (H, W) bool. Raises FileNotFoundError, or ValueError naming the row."""
    if isinstance(ref.mask, Path):
        return read_image(ref.mask, above_zero)
    try:
        return decode_rle(ref.mask[2], *ref.mask[:2])
    except Exception as error:
        raise ValueError(f"mask of ref_id {ref.ref_id} ({ref.image.name}): {error}. Fetch its list again or remove the "
                         "row.") from error


class RefSegDataset(Dataset):
    """One split of a data set. An item is one image with k of its phrases:

        image      (3, S, S) uint8 RGB, bilinear
        masks      (k, 1, S, S) bool, the stored mask, nearest
        originals  k masks (H, W) bool at the image's own size, for evaluation
        refs       k rows (Ref)

    k = 1 is the paper: every phrase is an item of its own. With k > 1 an image's phrases are dealt out k at a time, the
    last group filled up from the first. `cache` keeps decoded items, without originals, in memory (60 kB each at S = 96, k = 4).
    `clean` passes `masks` through `clean_mask`. `without` holds ref_ids to leave out.
    Raises FileNotFoundError or ValueError naming the file or row and the cure.
    """

    def __init__(self, root, split, side, phrases=1, cache=False, dataset=None, clean=False, without=()):
        self.root, self.split, self.side, self.clean = Path(root), split, side, clean
        self.dataset, refs = read_refs(root, dataset)
        self.refs = [ref for ref in refs if ref.split == split and ref.ref_id not in without]
        if not self.refs:
            raise ValueError(f"{self.root} has no phrases in its {split!r} split: training needs train, val and test.")
        for ref in self.refs:
            if not says_something(ref.phrase):
                raise ValueError(f"{self.root}: ref_id {ref.ref_id} ({ref.image.name}) has an empty phrase. Write one or remove "
                                 "the row.")
        files = {path for ref in self.refs for path in (ref.image, ref.mask) if isinstance(path, Path)}
        missing = sorted(str(path) for path in files if not path.is_file())
        if missing:
            raise FileNotFoundError(f"{len(missing)} files of the {split} split are missing: {', '.join(missing[:5])}"
                                    f"{' ...' * (len(missing) > 5)}. Fetch them again.")
        groups = {}
        for position, ref in enumerate(self.refs):
            groups.setdefault(ref.image if phrases > 1 else position, []).append(ref)
        self.items = [[group[(start + i) % len(group)] for i in range(phrases)]
                      for group in groups.values() for start in range(0, len(group), phrases)]
        self.cache = {} if cache else None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        refs = self.items[index]
        image = read_image(refs[0].image)
        originals = [resize_mask(read_mask(ref), image.height, image.width) for ref in refs]     # two of RRSIS-D's differ
        masks = [clean_mask(mask) for mask in originals] if self.clean else originals
        masks = np.stack([resize_mask(mask, self.side, self.side) for mask in masks])[:, None]
        item = dict(image=image_tensor(image, self.side), masks=torch.from_numpy(masks), originals=originals, refs=refs)
        if self.cache is not None:
            self.cache[index] = dict(item, originals=None)          # training never asks for them
        return item

    def __str__(self):
        text = f"{self.split}: {len(self.refs):,} phrases on {len({ref.image for ref in self.refs}):,} images"
        published = PUBLISHED.get(self.dataset)
        return text + (f" ({self.dataset} as published: {published[self.split]:,})" if published else "")


def collate(items):
    """Items -> a batch: images (B, 3, S, S) uint8, masks (N, 1, S, S) bool, originals (if not cached) and refs as
    lists of N."""
    return dict(images=torch.stack([item["image"] for item in items]), masks=torch.cat([item["masks"] for item in items]),
                originals=[mask for item in items for mask in item["originals"] or []],
                refs=[ref for item in items for ref in item["refs"]])


# -------------------------------------------------------------------------------------------------- check and download

def look_at(refs):
    """All rows of one image -> its bytes' sha1, [(ref_id, what is wrong, whether training would fail)], {ref_id: IoU of the
    stored mask with the cleaned one}."""
    found, speckle, image = [], {}, None
    try:
        image = read_image(refs[0].image)
        digest = hashlib.sha1(refs[0].image.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        digest = None
        found += [(ref.ref_id, str(error), True) for ref in refs]
    for ref in refs:
        if not says_something(ref.phrase):
            found.append((ref.ref_id, f"{ref.image.name}: the phrase {ref.phrase!r} is empty", True))
        try:
            mask = read_mask(ref)
        except (OSError, ValueError) as error:
            found.append((ref.ref_id, str(error), True))
            continue
        if image and mask.shape != (image.height, image.width):
            height, width = mask.shape
            found.append((ref.ref_id, f"{ref.image}: {image.width} x {image.height} pixels, its mask {width} x {height}", False))
        if not mask.any():
            found.append((ref.ref_id, f"{ref.image.name}: the mask is empty", False))
        speckle[ref.ref_id] = overlap(mask, clean_mask(mask))
    return digest, found, speckle


def check(root, dataset=None):
    """Open every image and mask of a data set -> its rows, and what ROOT/check.json then holds: dataset, fingerprint, phrases by
    split, defects [{ref_id, split, what, fatal}], speckle {ref_id: IoU of the mask with the cleaned one}. A defect is fatal if
    training would fail of it."""
    dataset, refs = read_refs(root, dataset)
    groups = {}
    for ref in refs:
        groups.setdefault(ref.image, []).append(ref)
    defects, speckle, twins = [], {}, {}
    with ProcessPoolExecutor() as pool:
        results = pool.map(look_at, groups.values(), chunksize=8)
        for group, (digest, found, iou) in zip(groups.values(), tqdm(results, f"checking {root}", len(groups), unit="image")):
            split = {ref.ref_id: ref.split for ref in group}
            defects += [dict(ref_id=ref_id, split=split[ref_id], what=what, fatal=fatal) for ref_id, what, fatal in found]
            speckle |= iou
            if digest:
                twins.setdefault(digest, []).extend(group)
    for group in twins.values():
        if len({ref.split for ref in group}) > 1:
            places = ", ".join(sorted({f"{ref.image.name} ({ref.split})" for ref in group}))
            defects.append(dict(ref_id=group[0].ref_id, split=group[0].split, fatal=False,
                                what=f"the same image in several splits: {places}"))
    report = dict(dataset=dataset, fingerprint=fingerprint(dataset, refs), phrases=Counter(ref.split for ref in refs),
                  defects=defects, speckle=speckle)
    partial = Path(root) / "check.json.partial"
    try:
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(Path(root) / "check.json")
        print(f"wrote {root}/check.json")
    except OSError as error:
        print(f"{root}/check.json cannot be written ({error.strerror}): every start will check the data again")
    return refs, report


def fingerprint(dataset, refs):
    """Changes when a list or a file does."""
    files = sorted({path for ref in refs for path in (ref.image, ref.mask) if isinstance(path, Path)})
    states = [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in files]
    return hashlib.sha1(repr((dataset, refs, states)).encode(errors="replace")).hexdigest()


def fatal_defects(root, dataset=None):
    """The defects of which training would fail, as ROOT/check.json has them if nothing changed since, or from a check."""
    try:
        report = json.loads((Path(root) / "check.json").read_text())
        if report["fingerprint"] == fingerprint(*read_refs(root, dataset)):
            return [{key: defect[key] for key in ("ref_id", "split", "what")} for defect in report["defects"] if defect["fatal"]]
    except OSError:
        pass                                                        # never checked
    except Exception as error:                                      # cut, or not written by a check
        print(f"{root}/check.json cannot be relied on ({error!r}): checking again")
    return [defect for defect in check(root, dataset)[1]["defects"] if defect["fatal"]]


def speckle_table(refs, speckle):
    """How far the stored masks are from their cleaned selves, over all rows and per category, as a markdown table."""
    table = ["| category | phrases | IoU, 5 % | 25 % | median | out of reach of Pr@0.9 |", "|---|---|---|---|---|---|"]
    for category in ["all", *sorted({ref.category for ref in refs})]:
        values = np.array([speckle[ref.ref_id] for ref in refs if ref.ref_id in speckle and category in ("all", ref.category)])
        if len(values):
            low, quarter, median = np.quantile(values, (0.05, 0.25, 0.5))
            table.append(f"| {category} | {len(values):,} | {low:.3f} | {quarter:.3f} | {median:.3f} | "
                         f"{(values <= 0.9).mean():.1%} |")
    return "\n".join(table)


def overlay(image, mask, colour=(255, 40, 40)):
    """PIL image RGB and (H, W) bool -> the image, the mask in its own light with an outline, the rest dimmed."""
    mask = Image.fromarray(np.asarray(mask)).convert("L")
    painted = Image.composite(image, image.point(lambda value: int(0.65 * value)), mask)
    for width, line in ((7, (255, 255, 255)), (5, colour)):                         # white around it: a red ship is outlined too
        painted.paste(line, mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(width)), mask))
    return painted


def sample_sheet(refs, columns=4, rows=3, side=300):
    """Some rows, drawn from all by chance: the image, its mask in its own light, the phrase below -> PIL image."""
    sheet = Image.new("RGB", (columns * (side + 10), rows * (side + 34)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, ref in enumerate(random.Random(0).sample(refs, min(columns * rows, len(refs)))):
        image = overlay(read_image(ref.image).resize((side, side)), resize_mask(read_mask(ref), side, side))
        x, y = place % columns * (side + 10), place // columns * (side + 34)
        sheet.paste(image, (x, y))
        draw.text((x, y + side + 2), f"{ref.split}: {ref.phrase[:46]}\n{ref.phrase[46:100]}", fill="black")
    return sheet


def report_check(root, dataset=None):
    """What `data.py check` prints and writes. Raises ValueError at its end if training would fail."""
    refs, report = check(root, dataset)
    dataset, counts, defects = report["dataset"], report["phrases"], report["defects"]
    for split in SPLITS:
        published = f" (as published: {PUBLISHED[dataset][split]:,})" if dataset in PUBLISHED else ""
        print(f"{dataset} {split}: {counts[split]:,} phrases{published}")
    for defect in defects:
        print(f"{'DEFECT' if defect['fatal'] else 'note'}: {defect['split']}, ref_id {defect['ref_id']}: {defect['what']}")
    print("Stored masks against their 5 x 5 median. Where the IoU is at most 0.9, a prediction without the noise cannot count "
          "for Pr@0.9 (things of a few pixels, which the median rounds off, are among them):")
    print(speckle_table(refs, report["speckle"]))
    bad = {defect["ref_id"] for defect in defects if defect["fatal"]}
    sample_sheet([ref for ref in refs if ref.ref_id not in bad]).save(Path(root) / "check.jpg", quality=90)
    print(f"wrote {root}/check.jpg")
    if bad:
        raise ValueError(f"{root}: training would fail of {len(bad)} rows, listed above. Repair them, fetch them again, or train "
                         "with --skip-bad.")
    if absent := [split for split in SPLITS if not counts[split]]:
        raise ValueError(f"{root}: training would fail, no phrases are in {' and '.join(absent)}.")


HUB = {"rrsisd": ("VoyageWang/rrsis-d", ("JPEGImages.zip", "instances.json", "refs(unc).p")),
       "refsegrs": ("JessicaYuan/RefSegRS", ("RefSegRS.zip",))}


def download(dataset, root):
    """Fetch a data set from the Hugging Face hub, compare the sha256 that the hub gives, and unpack it into ROOT. What the hub's
    cache has is not fetched again. Raises OSError or ValueError."""
    from huggingface_hub import HfApi, hf_hub_download             # reads HF_ENDPOINT and HF_HOME when it is imported
    repository, wanted = HUB[dataset]
    try:
        info = HfApi().dataset_info(repository, files_metadata=True)
        files = {PurePosixPath(file.rfilename).name: file for file in info.siblings}
        paths = {name: Path(hf_hub_download(repository, files[name].rfilename, repo_type="dataset", revision=info.sha))
                 for name in wanted}
    except Exception as error:                                      # each version of the client has its own kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"cannot fetch {', '.join(wanted)} of {repository}: {reason}. Try again.") from error
    for name, path in paths.items():
        if files[name].lfs:
            verify(path, files[name].lfs.sha256, f"{name} of {repository}")
        if path.suffix == ".zip":
            unpack(path, root, dataset)
        else:
            (root / "rrsisd").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / "rrsisd" / name)


def verify(path, expected, name):
    """Delete a file from the hub's cache, and raise ValueError, unless its sha256 is the expected one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if (got := digest.hexdigest()) != expected:
        path.resolve().unlink()                                     # the cache holds a link to it
        path.unlink(missing_ok=True)
        raise ValueError(f"{name} has sha256 {got}, not {expected}: the download is damaged or not the published file, and was "
                         "deleted. Try again, or another HF_ENDPOINT.")


def unpack(path, root, dataset):
    """A data set's zip into its layout. Raises ValueError, before anything is written, if a member's name leads elsewhere, or
    if the zip is damaged, and OSError if it does not fit on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                inside(root, member.filename.replace("\\", "/"))
            root.mkdir(parents=True, exist_ok=True)
            if (size := sum(member.file_size for member in members)) > shutil.disk_usage(root).free:
                raise OSError(f"{path.name} unpacks to {size / 2**30:.1f} GiB, more than {root} has room for.")
            top = next((PurePosixPath(member.filename).parent for member in members
                        if member.filename.endswith("output_phrase_train.txt")), "")
            for member in tqdm(members, f"unpacking {path.name}", unit="file"):
                name = PurePosixPath(member.filename)
                if dataset == "rrsisd":
                    target = root / "images" / "rrsisd" / "JPEGImages" / name.name
                elif name.is_relative_to(top):
                    target = root / name.relative_to(top)
                else:
                    continue
                if not target.exists() or target.stat().st_size != member.file_size:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} is no whole zip ({error}). Remove it and fetch it again.") from error


# --------------------------------------------------------------------------------------------------- the toy's scenes

SCENE = 256                                              # side of a scene in pixels
COLOURS = {"white": (236, 236, 232), "gray": (112, 114, 120), "red": (188, 48, 42),
           "blue": (44, 84, 190), "yellow": (232, 196, 44)}
SIZES = {"small": 0.175, "large": 0.29}                  # length as a share of the scene
GROUNDS = {"grass": (96, 122, 70), "soil": (164, 138, 104), "concrete": (158, 156, 150), "field": (136, 140, 84)}
WATER = (36, 72, 92)


def shade(colour, factor):
    return tuple(min(255, int(channel * factor)) for channel in colour)


# Each draws one object, pointing right, on a transparent square of p pixels: what it paints is its mask.

def draw_tank(draw, p, colour):
    draw.ellipse((0.05 * p, 0.05 * p, 0.95 * p, 0.95 * p), fill=shade(colour, 0.72))
    draw.ellipse((0.11 * p, 0.11 * p, 0.89 * p, 0.89 * p), fill=colour)
    for i in range(6):                                   # the roof's ribs
        dx, dy = 0.38 * math.cos(i * math.pi / 3), 0.38 * math.sin(i * math.pi / 3)
        draw.line((p / 2, p / 2, p * (0.5 + dx), p * (0.5 + dy)), fill=shade(colour, 0.84), width=4)
    draw.ellipse((0.42 * p, 0.42 * p, 0.58 * p, 0.58 * p), fill=shade(colour, 0.78))


def draw_tennis(draw, p, colour):
    draw.rectangle((0.02 * p, 0.22 * p, 0.98 * p, 0.78 * p), fill=colour)
    white, w = (240, 240, 240), max(1, p // 45)
    draw.rectangle((0.12 * p, 0.29 * p, 0.88 * p, 0.71 * p), outline=white, width=w)
    for x1, y1, x2, y2 in ((0.12, 0.35, 0.88, 0.35), (0.12, 0.65, 0.88, 0.65), (0.3, 0.5, 0.7, 0.5),
                           (0.3, 0.35, 0.3, 0.65), (0.5, 0.26, 0.5, 0.74), (0.7, 0.35, 0.7, 0.65)):
        draw.line((x1 * p, y1 * p, x2 * p, y2 * p), fill=white, width=w)


def draw_ship(draw, p, colour):
    hull = [(0.0, 0.32), (0.62, 0.28), (1.0, 0.5), (0.62, 0.72), (0.0, 0.68)]
    deck = [(0.06, 0.38), (0.6, 0.34), (0.88, 0.5), (0.6, 0.66), (0.06, 0.62)]
    draw.polygon([(x * p, y * p) for x, y in hull], fill=colour)
    draw.polygon([(x * p, y * p) for x, y in deck], fill=shade(colour, 0.8))
    draw.rectangle((0.12 * p, 0.4 * p, 0.34 * p, 0.6 * p), fill=colour, outline=shade(colour, 0.5), width=2)
    draw.rectangle((0.44 * p, 0.44 * p, 0.62 * p, 0.56 * p), fill=shade(colour, 0.6))


def draw_baseball(draw, p, colour):
    draw.pieslice((-0.92 * p, 0.04 * p, 0.96 * p, 1.92 * p), 270, 360, fill=colour)              # a quarter disc
    draw.polygon([(x * p, y * p) for x, y in ((0.09, 0.91), (0.09, 0.5), (0.5, 0.5), (0.5, 0.91))], fill=(104, 140, 72))
    foul_lines = [(x * p, y * p) for x, y in ((0.05, 0.06), (0.05, 0.95), (0.94, 0.95))]
    draw.line(foul_lines, fill=(240, 240, 240), width=max(2, p // 40))
    draw.ellipse((0.25 * p, 0.65 * p, 0.35 * p, 0.75 * p), fill=colour)                          # the mound
    for x, y in ((0.09, 0.91), (0.09, 0.5), (0.5, 0.5), (0.5, 0.91)):
        draw.rectangle((x * p - p / 40, y * p - p / 40, x * p + p / 40, y * p + p / 40), fill=(245, 245, 245))


def draw_vehicle(draw, p, colour):
    draw.rounded_rectangle((0.03 * p, 0.27 * p, 0.97 * p, 0.73 * p), radius=0.12 * p, fill=colour)
    glass = (36, 42, 50)
    draw.polygon([(x * p, y * p) for x, y in ((0.62, 0.34), (0.74, 0.3), (0.74, 0.7), (0.62, 0.66))], fill=glass)
    draw.polygon([(x * p, y * p) for x, y in ((0.2, 0.34), (0.12, 0.31), (0.12, 0.69), (0.2, 0.66))], fill=glass)
    draw.line((0.24 * p, 0.31 * p, 0.58 * p, 0.31 * p), fill=glass, width=max(1, p // 36))
    draw.line((0.24 * p, 0.69 * p, 0.58 * p, 0.69 * p), fill=glass, width=max(1, p // 36))


def draw_airplane(draw, p, colour):
    for shape in ([(0.7, 0.44), (0.4, 0.02), (0.2, 0.02), (0.32, 0.44)], [(0.7, 0.56), (0.4, 0.98), (0.2, 0.98), (0.32, 0.56)],
                  [(0.2, 0.46), (0.1, 0.24), (-0.02, 0.24), (0.03, 0.5), (-0.02, 0.76), (0.1, 0.76), (0.2, 0.54)]):
        draw.polygon([(x * p, y * p) for x, y in shape], fill=shade(colour, 0.88))
    draw.rounded_rectangle((0.0, 0.4 * p, p - 1, 0.6 * p), radius=0.1 * p, fill=colour)
    draw.ellipse((0.86 * p, 0.45 * p, 0.95 * p, 0.55 * p), fill=(50, 58, 70))
    for y in (0.26, 0.74):                               # engines
        draw.rounded_rectangle((0.36 * p, (y - 0.035) * p, 0.52 * p, (y + 0.035) * p), radius=0.03 * p, fill=shade(colour, 0.6))


# category -> how it is said, how it is drawn, the colours it comes in
TOY = {
    "storagetank": ("storage tank", draw_tank, ("white", "gray", "red", "blue", "yellow")),
    "tenniscourt": ("tennis court", draw_tennis, ("gray", "red", "blue", "yellow")),
    "ship": ("ship", draw_ship, ("white", "gray", "red", "blue", "yellow")),
    "baseballfield": ("baseball field", draw_baseball, ("gray", "red", "yellow")),
    "vehicle": ("vehicle", draw_vehicle, ("white", "gray", "red", "blue", "yellow")),
    "airplane": ("airplane", draw_airplane, ("white", "gray", "red", "blue", "yellow")),
}


@dataclass
class Thing:
    category: str
    colour: str
    size: str
    x: float         # centre, in [0, 1], x to the right and y down
    y: float
    angle: float     # degrees
    mask: np.ndarray = None


def texture(rng, side, cells, strength):
    """(side, side) smooth noise of about `cells` bumps a side."""
    noise = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((side, side), Image.BICUBIC))


def arrange(rng):
    """Choose the shore line, the road and the things of a scene, well apart -> things, shore, road. With x, y from the centre it
    is water where x shore[0] + y shore[1] + shore[2] > 0; the road runs along (road[0], road[1]), road[2] beside the centre, at
    road[3] degrees."""
    angle = rng.uniform(0, 2 * math.pi)
    shore = (math.cos(angle), math.sin(angle), rng.uniform(-0.12, 0.12)) if rng.random() < 0.45 else None
    angle = rng.uniform(0, math.pi)
    road = (math.cos(angle), math.sin(angle), rng.uniform(-0.25, 0.25), math.degrees(angle)) if rng.random() < 0.6 else None
    names = [name for name in TOY if (name != "ship" or shore)]
    main, other, *_ = rng.permutation(names)
    if shore and rng.random() < 0.6:
        main, other = "ship", (main if main != "ship" else other)
    wanted = [main] * rng.integers(2, 4) + [other] * rng.integers(1, 3) + list(rng.permutation(names)[:rng.integers(0, 2)])
    things = []
    for category in wanted:
        for _ in range(60):
            size = str(rng.choice(list(SIZES)))
            half = SIZES[size] / 2
            x, y = rng.uniform(0.02 + half, 0.98 - half, 2)
            angle = rng.uniform(0, 360)
            if category == "vehicle" and road and rng.random() < 0.5:                            # half of them drive
                along = (x - 0.5) * road[0] + (y - 0.5) * road[1]
                x, y = 0.5 + along * road[0] - road[2] * road[1], 0.5 + along * road[1] + road[2] * road[0]
                angle = -road[3] + 180 * rng.integers(0, 2)
            depth = (x - 0.5) * shore[0] + (y - 0.5) * shore[1] + shore[2] if shore else -1      # > 0: in the water
            whole = half < x < 1 - half and half < y < 1 - half
            clear = all(math.hypot(x - t.x, y - t.y) > 0.58 * (SIZES[size] + SIZES[t.size]) for t in things)
            afloat = depth > SIZES[size] / 3 if category == "ship" else depth < -half
            off_road = not road or abs((y - 0.5) * road[0] - (x - 0.5) * road[1] - road[2]) > 0.08 + half
            if whole and clear and afloat and (off_road or category == "vehicle"):
                things.append(Thing(str(category), str(rng.choice(TOY[category][2])), size, x, y, angle))
                break
    return things, shore, road


def blend(scene, colour, cover):
    """Lay `colour` over scene (H, W, 3) in place, as opaque as cover (H, W) in [0, 1] says."""
    scene += (colour - scene) * cover[..., None]


def paint_ground(rng, shore, road):
    """Texture, trees, road and water -> (SCENE, SCENE, 3) float32."""
    v, u = np.mgrid[0:SCENE, 0:SCENE].astype(np.float32) / SCENE - 0.5
    edge = lambda distance: np.clip(distance * SCENE + 0.5, 0, 1)                                # > 0 inside, one pixel soft
    light = texture(rng, SCENE, 5, 9) + texture(rng, SCENE, 24, 6) + texture(rng, SCENE, 120, 7)
    scene = np.array(GROUNDS[str(rng.choice(list(GROUNDS)))], np.float32) * np.float32(rng.uniform(0.85, 1.1)) + light[..., None]
    if rng.random() < 0.4:                                                                       # ploughed parcels
        slope = rng.uniform(0, math.pi)
        a, b = u * math.cos(slope) + v * math.sin(slope), v * math.cos(slope) - u * math.sin(slope)
        scene += (((a * 3).round() + 2 * (b * 2).round()) % 3 * 7 + np.sin(a * 330) * 3 - 7)[..., None]
    picture = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y in rng.uniform(0, SCENE, (rng.integers(6, 30), 2)):                                 # trees in small groups
        for dx, dy in rng.normal(0, 6, (rng.integers(1, 6), 2)):
            r, tone = rng.uniform(2, 5), rng.uniform(0.7, 1.1)
            cx, cy = x + dx, y + dy
            draw.ellipse((cx - r + 2, cy - r + 2, cx + r + 2, cy + r + 2), fill=(50, 58, 42))
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=shade((58, 92, 46), tone))
            draw.ellipse((cx - 0.6 * r, cy - 0.7 * r, cx + 0.3 * r, cy + 0.2 * r), fill=shade((76, 112, 58), tone))
    scene = np.array(picture, np.float32)
    if road:
        across, along = np.abs(v * road[0] - u * road[1] - road[2]), u * road[0] + v * road[1]
        blend(scene, (98 + 0.5 * light)[..., None], edge(0.075 - across))
        blend(scene, 214, np.maximum(edge(0.003 - np.abs(across - 0.068)), edge(0.003 - across) * (along * 16 % 1 < 0.5)))
    if shore:
        depth = u * shore[0] + v * shore[1] + shore[2] + texture(rng, SCENE, 12, 0.008)
        blend(scene, (np.array((176, 164, 132)) + light[..., None]), edge(depth + 0.02))        # a strip of sand or quay
        waves = texture(rng, SCENE, 60, 3) + 0.3 * light + np.sin((u * shore[1] - v * shore[0] + depth) * 260) * 1.5
        blend(scene, np.array(WATER) + waves[..., None], edge(depth))
    return scene


def paint_thing(rng, scene, thing):
    """Draw one thing with its shadow into scene and set its mask (SCENE, SCENE)."""
    p = int(4 * SIZES[thing.size] * SCENE)                          # drawn at four times the size, then averaged down
    patch = Image.new("RGBA", (p, p))
    colour = tuple(int(np.clip(channel + rng.normal(0, 6), 0, 255)) for channel in COLOURS[thing.colour])
    TOY[thing.category][1](ImageDraw.Draw(patch), p, colour)
    patch = np.asarray(patch.rotate(thing.angle, Image.NEAREST, expand=True).reduce(4), np.float32)
    h, w, _ = patch.shape
    top, left = round(thing.y * SCENE - h / 2), round(thing.x * SCENE - w / 2)
    drop = 2 if thing.category in ("tenniscourt", "baseballfield") else 4                        # flat: next to no shadow
    rows, columns = slice(max(0, top), min(SCENE, top + h)), slice(max(0, left), min(SCENE, left + w))
    patch = patch[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
    colours, alpha = patch[..., :3], patch[..., 3] / 255
    under = scene[rows.start + drop:rows.stop + drop, columns.start + drop:columns.stop + drop]
    blend(under, 20, 0.45 * alpha[:under.shape[0], :under.shape[1]])
    blend(scene[rows, columns], colours + texture(rng, SCENE, 100, 4)[rows, columns, None], alpha)
    thing.mask = np.zeros((SCENE, SCENE), bool)
    thing.mask[rows, columns] = alpha > 0.5


# -------------------------------------------------------------------------------------------------- the toy's phrases

# place -> how far a point is from it; nearer than the first bound it is there, beyond the second it clearly is not. Between the
# two a phrase would be a matter of taste, so it is not written.
PLACES = {
    "on the left": (lambda x, y: x, 0.36, 0.5), "on the right": (lambda x, y: 1 - x, 0.36, 0.5),
    "on the top": (lambda x, y: y, 0.36, 0.5), "on the bottom": (lambda x, y: 1 - y, 0.36, 0.5),
    "in the middle": (lambda x, y: max(abs(x - 0.5), abs(y - 0.5)), 0.15, 0.25),
    "on the upper left": (lambda x, y: max(x, y), 0.4, 0.52),
    "on the upper right": (lambda x, y: max(1 - x, y), 0.4, 0.52),
    "on the lower left": (lambda x, y: max(x, 1 - y), 0.4, 0.52),
    "on the lower right": (lambda x, y: max(1 - x, 1 - y), 0.4, 0.52),
}
DIRECTIONS = "right", "lower right", "bottom", "lower left", "left", "upper left", "top", "upper right"      # by 45 degrees
KINDS = {"attribute": 0.38, "place": 0.34, "relation": 0.28}          # how often each kind of phrase is written, where it can be


def bearing(thing, anchor, direction):
    """How many degrees `thing` lies off `direction` as seen from `anchor`."""
    angle = math.degrees(math.atan2(thing.y - anchor.y, thing.x - anchor.x)) - 45 * DIRECTIONS.index(direction)
    return abs((angle + 180) % 360 - 180)


def describe(things, thing, attributes):
    """("size", "colour") -> "small red ship", and the things of its class that these words do not rule out."""
    words = [getattr(thing, attribute) for attribute in attributes] + [TOY[thing.category][0]]
    rivals = [other for other in things if other is not thing and other.category == thing.category
              and all(getattr(other, attribute) == getattr(thing, attribute) for attribute in attributes)]
    return " ".join(words), rivals


def phrases_for(things, thing):
    """Every phrase that names `thing` and nothing else in the scene, by kind -> {kind: [phrase, ...]}."""
    found = {kind: [] for kind in KINDS}
    anchors = [(other, *describe(things, other, attributes)) for other in things if other.category != thing.category
               for attributes in ((), ("colour",))]
    for attributes in ((), ("colour",), ("size",), ("size", "colour")):
        name, rivals = describe(things, thing, attributes)
        if not rivals:
            found["attribute"].append(name)
        for place, (far, inner, outer) in PLACES.items():
            if far(thing.x, thing.y) < inner and all(far(other.x, other.y) > outer for other in rivals):
                found["place"].append(f"{name} {place}")
        for anchor, anchor_name, doubles in anchors:
            for direction in DIRECTIONS:
                there = bearing(thing, anchor, direction) < 20
                if there and not doubles and all(bearing(other, anchor, direction) > 50 for other in rivals):
                    found["relation"].append(f"{name} on the {direction} of the {anchor_name}")
    return {kind: phrases for kind, phrases in found.items() if phrases}


def choose_phrase(rng, things, thing):
    """One of the phrases that name `thing`: any kind that can, mostly in few words. None if nothing tells it apart."""
    found = phrases_for(things, thing)
    if not found:
        return None
    shares = np.array([KINDS[kind] for kind in found])
    kind = str(rng.choice(list(found), p=shares / shares.sum()))
    phrases = sorted(rng.permutation(found[kind]).tolist(), key=lambda phrase: len(phrase.split()))
    phrase = phrases[min(int(rng.exponential(0.8)), len(phrases) - 1)]
    return ("The " if rng.random() < 0.5 else "An " if phrase[0] == "a" else "A ") + phrase


def toy_scene(seed, index):
    """-> PIL image, [(thing, phrase), ...] with four phrases; the same for the same (seed, index)."""
    rng = np.random.default_rng([seed, index])
    rows = []
    while len(rows) < 4:                                            # a scene too crowded for four phrases is drawn anew
        things, shore, road = arrange(rng)
        rows = [(thing, phrase) for thing in things if (phrase := choose_phrase(rng, things, thing))]
    scene = paint_ground(rng, shore, road)
    for i, thing in enumerate(things):
        paint_thing(rng, scene, thing)
        for below in things[:i]:                                    # where two corners meet, the upper one counts
            below.mask &= ~thing.mask
    scene += rng.normal(0, 3, (SCENE, SCENE, 1))                    # sensor noise
    chosen = rng.permutation(len(rows))[:4]
    return Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8)), [rows[i] for i in chosen]


def save_scene(job):
    """Write one scene's JPEG; -> its refs and annotations in RRSIS-D's form."""
    folder, seed, index, split = job
    image, rows = toy_scene(seed, index)
    name, refs, annotations = f"{index:05d}.jpg", [], []
    image.save(folder / name, quality=95)
    for i, (thing, phrase) in enumerate(rows):
        number, category = 4 * index + i, CATEGORIES.index(thing.category)
        annotations.append(dict(id=number, image_id=index, categories_id=category, area=int(thing.mask.sum()),
                                bbox=Image.fromarray(thing.mask).getbbox(),                       # x1 y1 x2 y2
                                segmentation=[dict(size=[SCENE, SCENE], counts=encode_rle(thing.mask))]))
        sentence = dict(tokens=phrase.lower().split(), raw=phrase, sent_id=number, sent=phrase)
        refs.append(dict(image_id=index, split=split, sentences=[sentence], file_name=name, category_id=category,
                         ann_id=number, sent_ids=[number], ref_id=number))
    return refs, annotations


def write_toy(root, train=3000, val=100, test=320, seed=0):
    """Draw a toy RRSIS-D into ROOT, in the published files and layout, four phrases a scene."""
    root = Path(root)
    folder, lists = root / "images" / "rrsisd" / "JPEGImages", root / "rrsisd"
    if (lists / "refs(unc).p").exists():
        raise ValueError(f"{root} already holds a data set: name another folder or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    lists.mkdir(exist_ok=True)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    jobs = [(folder, seed, index, split) for index, split in enumerate(splits)]
    with ProcessPoolExecutor() as pool:
        rows = list(tqdm(pool.map(save_scene, jobs, chunksize=16), f"drawing {root}", len(jobs), unit="scene"))
    images = [dict(id=index, file_name=f"{index:05d}.jpg", height=SCENE, width=SCENE) for index in range(len(jobs))]
    (lists / "instances.json").write_text(json.dumps(dict(
        images=images, annotations=[row for _, some in rows for row in some],
        categories=[dict(id=i, name=name) for i, name in enumerate(CATEGORIES)])))
    partial = lists / "refs.partial"                                # last: a folder that has it is complete
    partial.write_bytes(pickle.dumps([ref for some, _ in rows for ref in some]))
    partial.replace(lists / "refs(unc).p")


def toy_tokenizer():
    """A word-level tokenizer of the toy's vocabulary, with SigLIP's special ids: 0 <pad>, 1 </s> (appended), 2 <unk>."""
    words = " ".join(["a an the of", *COLOURS, *SIZES, *PLACES, *DIRECTIONS, *(name for name, _, _ in TOY.values())]).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def leave_group(worker):
    """worker_init_fn of a DataLoader: a Ctrl-C, or a signal to the whole job, must not end the processes that read images, once
    they have started, while the training process finishes its step and saves; but they must end with it (torch's own watch can
    wait for ever for somebody to empty its queue)."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if hasattr(os, "setsid"):                                       # where there are such groups: not on Windows
        os.setsid()


def run(main):
    """Run a command: bad input ends it with one line and exit status 1 instead of a traceback."""
    try:
        main()
    except (OSError, ValueError, BrokenProcessPool) as error:
        text = str(error)
        if "DataLoader worker" in text:                             # its error arrives as its whole traceback: keep the message
            last = text.strip().splitlines()[-1]
            text = last.partition("Error: ")[2] or last
        sys.exit(f"error: {text}")


def positive(text):
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check, download or draw a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("check", help="open every image and mask, list every defect, write check.json and check.jpg")
    some.add_argument("dir", type=Path)
    some.add_argument("--dataset", choices=list(FORMATS), help="if the folder does not tell")
    some = commands.add_parser("download", help="fetch from the Hugging Face hub, verify, unpack, check")
    some.add_argument("dataset", choices=list(HUB))
    some.add_argument("dir", type=Path)
    some = commands.add_parser("toy", help="draw a toy RRSIS-D")
    some.add_argument("dir", type=Path)
    some.add_argument("--train", type=positive, default=3000, help="scenes, four phrases each")
    some.add_argument("--val", type=positive, default=100)
    some.add_argument("--test", type=positive, default=320)
    some.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "toy":
        write_toy(args.dir, args.train, args.val, args.test, args.seed)
        print(f"{args.dir}: {4 * args.train:,} train, {4 * args.val:,} val, {4 * args.test:,} test phrases")
        return
    if args.command == "download":
        download(args.dataset, args.dir)
    report_check(args.dir, args.dataset)


if __name__ == "__main__":
    run(main)
