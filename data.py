"""Data sets of aerial images with phrases and masks, and a toy data set that is drawn.

    RRSIS-D     rrsisd/refs(unc).p, rrsisd/instances.json, images/rrsisd/JPEGImages/*.jpg
    RefSegRS    output_phrase_{train,val,test}.txt of "<id> <phrase>", images/<id>.tif, masks/<id>.tif
    RISBench    img_rgb/*.png with either output_phrase_{train,val,test}.txt and mask/*.png, or *.jsonl,
                whose lines have file_name, sent, split, segmentation and perhaps category_name
    own         images/, masks/ (foreground is above 0), and phrases.jsonl, whose lines have image, mask,
                phrase, split and perhaps category

B items, each an image with k of its phrases, N = B k, S side of the model's input, H W an image's size.
"""
import argparse
import ctypes
import json
import math
import pickle
import shutil
import signal
import sys
import textwrap
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # satellite scenes exceed Pillow's limit of 179 million pixels
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")  # no EPS: Ghostscript
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2")  # that image_files lists

SPLITS = ("train", "val", "test")
# One row: a phrase and the mask of what it names. image is a Path; mask is a Path or, as in COCO, a dict
# or list. Where the data have no ids, ref_id is "file:line"; where they have no category, it is "-".
Ref = namedtuple("Ref", "ref_id split image phrase category mask")

class InputError(ValueError):
    """Bad input, described in one line for the person who gave it."""

@contextmanager
def error_context(place, problems=None):
    """Turn an error inside a `with` into an InputError that names the place. Given `problems`, a list,
    append the text to it instead and go on after the `with`."""
    try:
        yield
    except Exception as error:  # damaged files cause errors of many classes
        kind = "" if type(error) in (InputError, ValueError) else f"{type(error).__name__}: "
        text = f"{place}: {kind}{textwrap.shorten(str(error), 1000)}"
        text = text.replace("KeyError: ", "no field ")  # KeyError: 'sent' -> no field 'sent'
        if problems is None:
            raise InputError(f"{text.rstrip('.')}. Correct it or fetch it again.") from error
        problems.append(text)

# ------------------------------------------------------------------------------------- images and masks
def is_16_bit_colour(image):
    """True if a PIL image has several channels of 16 bits in its file. Once loaded, nothing tells."""
    if len(image.getbands()) == 1:
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample, one number per channel
    if image.format == "JPEG2000" and image.fp:
        image.fp.seek(0)  # to load it, Pillow seeks again
        header = image.fp.read(65536).partition(b"\xff\x4f\xff\x51")[2]  # after the markers SOC, SIZ
        return len(header) > 38 and (header[38] & 127) > 7  # byte 38, Ssiz: a sign bit, 7 of depth - 1
    layouts = [tile[3] for tile in getattr(image, "tile", [])]  # raw mode; of a PPM (mode, maximum)
    return any(layout in ("LA;16B", "RGB;16B", "RGBA;16B", ("RGB", 65535)) for layout in layouts)

def upright(image):
    """PIL image -> a copy, turned by its EXIF orientation, as viewers do. A TIFF's orientation is
    ignored, as in GDAL. Raises InputError for colour of 16 bits."""
    if is_16_bit_colour(image):  # Pillow keeps only the high byte: at most 15 if a sensor has 12 bits
        raise InputError("colour of 16 bits is not supported: gdal_translate -ot Byte -scale IN OUT.tif")
    if image.format == "TIFF":
        image.getexif()[274] = 1  # orientation: upright, else Pillow turns the pixels on loading
    image.load()  # here, because `suppress` would hide damaged pixels
    with suppress(Exception):  # damaged EXIF raises errors of many classes; viewers ignore it
        return ImageOps.exif_transpose(image)
    return image.copy()

def stretch(values):
    """Grey (H, W) float32 -> uint8: 0 up to its 2nd percentile, 255 from its 98th. A minimum or maximum
    shared by over 2 % of the pixels ("no data", saturation) is left out of the percentiles."""
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)  # all NaN: black
    ends = [end for end in (finite.min(), finite.max()) if (finite == end).mean() > 0.02]
    inner = finite[~np.isin(finite, ends)]
    low, high = np.percentile(inner, (2, 98)) if inner.size else (0, 0)
    if low == high:  # nearly all pixels are equal, as at night: from the minimum to the maximum
        low, high = finite.min(), finite.max()
    values = np.clip((values - low) * (255 / max(high - low, 1e-9)), 0, 255)
    return np.nan_to_num(values).round().astype(np.uint8)  # NaN is black

def to_rgb(image):
    """PIL image of any mode -> RGB, upright, transparency ignored, grey of over 8 bits stretched."""
    image = upright(image)
    if image.mode.startswith(("I", "F")):  # integers of 16 or 32 bits, floats
        image = Image.fromarray(stretch(np.array(image, dtype=np.float32)))
    return image.convert("RGB")

def binarize(image):
    """PIL image -> mask (H, W) bool, True where its grey or colour, not transparency, is above 0."""
    image = upright(image)
    if len(image.getbands()) > 1 or image.mode == "P":  # P: indices of a palette's colours
        image = image.convert("RGB")
        return np.asarray(image).any(-1)
    return np.asarray(image) > 0

def read_image(path, convert=to_rgb):
    """Return an image file as an RGB PIL image, or as what `convert` makes of it. Raises InputError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return convert(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{error}. Fetch it again, or, if it is a TIFF that is neither one band of up "
                         "to 32 bits nor up to four of 8 bits with RGB: gdal_translate -b 1 -b 2 -b 3 "
                         f"-ot Byte -scale -co PHOTOMETRIC=RGB {path} OUT.tif") from error
    except Exception as error:  # each decoder raises its own classes
        raise InputError(f"image {path}: {error}. Fetch or convert it again.") from error

def image_files(folder):
    """Return the sorted paths of a folder's images, without hidden files such as macOS's ._* files."""
    return [path for path in sorted(Path(folder).iterdir())
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]

def image_tensor(image, side):
    """RGB PIL image -> (3, side, side) uint8, bilinear. The aspect ratio is not kept."""
    return torch.from_numpy(np.array(image.resize((side, side), Image.BILINEAR))).permute(2, 0, 1)

def tile_starts(length, tile):
    """Return the starts of windows of size `tile` along `length` >= tile. They overlap by half or so."""
    steps = math.ceil(2 * (length - tile) / tile)
    return np.linspace(0, length - tile, steps + 1).round().astype(int).tolist()

def resize_mask(mask, height, width):
    """(H, W) bool -> (height, width) bool, nearest."""
    return np.array(Image.fromarray(mask).resize((width, height), Image.NEAREST))

def parse_runs(text):
    """COCO's run lengths as a string -> list of ints. A number is cut into groups of 5 bits, the lowest
    first. Each is a character: 48 + the group, + 32 if another one follows."""
    runs = []
    groups = []
    for character in text:
        bits = ord(character) - 48
        groups.append(bits & 31)
        if bits & 32 == 0:  # the number is complete
            value = sum(group << 5 * i for i, group in enumerate(groups))
            if bits & 16:  # its highest bit is set: negative, in two's complement
                value -= 1 << 5 * len(groups)
            if len(runs) > 2:  # from the fourth run on, the difference to the run two before is stored
                value += runs[-2]
            runs.append(value)
            groups = []
    return runs

def decode_segmentation(segmentation):
    """COCO's run lengths {size: [H, W], counts: list or string} -> mask (H, W) bool; runs of 0s and 1s
    alternate, column by column. A list of such parts -> their union. Raises InputError."""
    if isinstance(segmentation, list) and isinstance(segmentation[0], (dict, list)):
        return np.any([decode_segmentation(part) for part in segmentation], 0)
    if not isinstance(segmentation, dict):  # a polygon: a list of numbers, alone or as a part
        raise InputError("polygons are not supported, only run lengths (pycocotools: annToRLE)")
    height, width = segmentation["size"]
    runs = segmentation["counts"]
    if isinstance(runs, str):
        runs = parse_runs(runs)
    if sum(runs) != height * width or min(runs) < 0:
        raise InputError(f"the run lengths are not those of {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T  # odd runs are 1s

def read_mask(ref):
    """Return the stored mask of a row, (H, W) bool. Raises InputError."""
    if isinstance(ref.mask, Path):
        return read_image(ref.mask, binarize)
    with error_context(f"mask of ref_id {ref.ref_id} ({ref.image.name})"):
        return decode_segmentation(ref.mask)

# -------------------------------------------------------------------------------------------- data sets
def make_ref(ref_id, split, image, phrase, category, mask):
    """Return a Ref, checked, without spaces around the phrase. Raises InputError."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not train, val or test")
    if not isinstance(phrase, str) or not any(character.isalnum() for character in phrase):
        raise InputError(f"the phrase {phrase!r} has no words")
    if not mask:
        raise InputError("the object has no segmentation")
    category = "-" if str(category) in ("", "None", "nan") else str(category)  # null and NaN of JSON
    return Ref(ref_id, split, image, phrase.strip(), category, mask)

def read_lines(path):
    """Yield (place, ref_id, line) for each line that is not blank; `place` is for error messages."""
    with error_context(path):
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines also splits at U+2028
    for i, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path.name} line {i}", f"{path.stem}:{i}", line.strip()

# These readers yield the Refs of a data set. A bad row is skipped, and described in `problems`.
def read_refsegrs(root, problems, images="images", masks="masks", suffix=".tif"):
    for split in SPLITS:
        for place, ref_id, line in read_lines(root / f"output_phrase_{split}.txt"):
            with error_context(place, problems):
                name, _, phrase = line.partition(" ")
                file = name.removesuffix(suffix) + suffix  # some ids have it
                yield make_ref(ref_id, split, root / images / file, phrase, "-", root / masks / file)

def read_risbench(root, problems):
    files = sorted(root.glob("*.jsonl"))
    if not files:
        yield from read_refsegrs(root, problems, "img_rgb", "mask", ".png")
    for path in files:
        for place, ref_id, line in read_lines(path):
            with error_context(place, problems):
                row = json.loads(line)
                yield make_ref(ref_id, row["split"], root / f"img_rgb/{row['file_name']}", row["sent"],
                               row.get("category_name"), row["segmentation"])

def read_own(root, problems):
    for place, ref_id, line in read_lines(root / "phrases.jsonl"):
        with error_context(place, problems):
            row = json.loads(line)
            yield make_ref(ref_id, row["split"], root / f"images/{row['image']}", row["phrase"],
                           row.get("category"), root / f"masks/{row['mask']}")

class PlainUnpickler(pickle.Unpickler):
    """Loads plain data. It refuses classes and functions, by which a pickle could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the pickle would call {module}.{name}")

def read_rrsisd(root, problems):
    folder = root / "rrsisd"
    with error_context(folder / "refs(unc).p"), open(folder / "refs(unc).p", "rb") as file:
        rows = list(PlainUnpickler(file).load())
    with error_context(folder / "instances.json"):
        instances = json.loads((folder / "instances.json").read_bytes())
        names = {row["id"]: row["name"] for row in instances["categories"]}
        masks = {row["id"]: row.get("segmentation") for row in instances["annotations"]}
    for i, row in enumerate(rows, 1):
        with error_context(f"refs(unc).p row {i}", problems):
            image = root / f"images/rrsisd/JPEGImages/{row['file_name']}"
            category = names.get(row.get("category_id"))
            mask = masks.get(row["ann_id"])
            for sentence in row["sentences"]:  # a bad one is left out, and those after it
                yield make_ref(row["ref_id"], row["split"], image, sentence["sent"], category, mask)

FORMATS = {  # name -> (path that tells it, reader, published numbers of phrases); the first is taken
    "rrsisd": ("rrsisd", read_rrsisd, "train 12,181, val 1,740, test 3,481"),
    "own": ("phrases.jsonl", read_own, "-"),
    "risbench": ("img_rgb", read_risbench, "train 26,300, val 10,013, test 16,159"),
    "refsegrs": ("output_phrase_train.txt", read_refsegrs, "train 2,172, val 431, test 1,817")}

def read_refs(root, format=None):
    """Return the name of a data set's format, its good rows, and what is wrong with the bad ones. If
    `format` is None it is detected. Raises InputError for a missing or damaged file."""
    root = Path(root)
    formats = [format] if format else list(FORMATS)
    found = [name for name in formats if (root / FORMATS[name][0]).exists()]
    if not found:
        raise InputError(f"no data set ({', '.join(formats)}) in {root.absolute()}. Name another folder "
                         f"or fetch RRSIS-D: python data.py download rrsisd {root}")
    _, reader, _ = FORMATS[found[0]]
    problems = []
    refs = list(reader(root, problems))
    return found[0], refs, problems

class RefSegDataset(Dataset):
    """One split of a data set. An item is an image with k = `phrases` of its phrases, as a dict:
        image        (3, S, S) uint8
        masks        (k, 1, S, S) bool
        originals    list of the k masks (H, W) bool, before they are resized to S
        refs         list of the k rows
    An image's phrases are split into items of k; its last item is filled up with its first phrases.
    Raises InputError for missing files, and for bad rows in any split."""

    def __init__(self, root, split, side, phrases=1, format=None):
        self.split = split
        self.side = side
        _, refs, problems = read_refs(root, format)
        if problems:
            raise InputError(f"{len(problems)} bad rows in {root}: {'; '.join(problems[:5])}. Correct "
                             f"or remove them. `python data.py check {root}` lists all.")
        self.refs = [ref for ref in refs if ref.split == split]
        if not self.refs:
            raise InputError(f"{root} has no {split} rows. Add some, or name another folder.")
        files = {path for ref in self.refs for path in (ref.image, ref.mask) if isinstance(path, Path)}
        missing = [str(path) for path in sorted(files) if not path.is_file()]
        if missing:
            raise InputError(f"{len(missing)} files of the {split} split are missing: "
                             f"{', '.join(missing[:5])}. Fetch them again or remove their rows.")
        by_image = defaultdict(list)
        for i, ref in enumerate(self.refs):  # for k = 1 the key is i, which keeps the order of the rows
            by_image[ref.image if phrases > 1 else i].append(ref)
        self.items = []
        for rows in by_image.values():
            for start in range(0, len(rows), phrases):
                self.items.append([rows[(start + i) % len(rows)] for i in range(phrases)])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        refs = self.items[index]
        image = read_image(refs[0].image)
        # Resized to the image, as two masks of RRSIS-D have another size.
        originals = [resize_mask(read_mask(ref), image.height, image.width) for ref in refs]
        masks = np.stack([resize_mask(mask, self.side, self.side) for mask in originals])
        return dict(image=image_tensor(image, self.side), masks=torch.from_numpy(masks)[:, None],
                    originals=originals, refs=refs)

def collate(items):
    """B items -> images (B, 3, S, S) uint8, masks (N, 1, S, S) bool, lists of N originals and refs."""
    return dict(images=torch.stack([item["image"] for item in items]),
                masks=torch.cat([item["masks"] for item in items]),
                originals=[mask for item in items for mask in item["originals"]],
                refs=[ref for item in items for ref in item["refs"]])

# ----------------------------------------------------------------------------- check, download, pictures
def check(root, format=None):
    """Open every image and mask of a data set, print its size and its defects, and write samples to
    ROOT/check.jpg. Raises InputError at the end if training would fail."""
    format, refs, errors = read_refs(root, format)
    splits = defaultdict(set)  # (image, phrase) -> its splits
    for ref in refs:
        splits[ref.image, ref.phrase].add(ref.split)
    warnings = defaultdict(list)  # defect -> its rows
    samples = []
    for i, ref in enumerate(tqdm(refs, f"checking {root}")):
        where = f"{ref.split}, ref_id {ref.ref_id}, {ref.image.name}"
        with error_context(where, errors):
            image = read_image(ref.image)
            mask = read_mask(ref)
            colours = []
            if isinstance(ref.mask, Path):  # the values, as grey of any depth; None: more than two
                colours = read_image(ref.mask, lambda picture: picture.convert("F").getcolors(2))
            defects = {"the mask has another size than the image": mask.shape != image.size[::-1],
                       "the mask is empty": not mask.any(), "the mask covers everything": mask.all(),
                       "the mask has more than two values": colours is None,
                       "another split has this image and phrase": len(splits[ref.image, ref.phrase]) > 1}
            for text, found in defects.items():
                if found:
                    warnings[text].append(where)
            if i % (len(refs) // 12 + 1) == 0:  # up to 12 samples
                picture = overlay(image.resize((300, 300)), resize_mask(mask, 300, 300))
                samples.append((f"{ref.split}: {ref.phrase}", picture))
    counts = Counter(ref.split for ref in refs)
    print(f"{format}: {dict(counts)} phrases. Published: {FORMATS[format][2]}")
    for text in errors:
        print(f"error: {text}")
    for text, rows in warnings.items():
        print(f"warning: {text}, {len(rows)} rows:", "; ".join(rows[:10]))
    if samples:
        contact_sheet(samples, 4, 300).save(Path(root, "check.jpg"), quality=90)
        print(f"wrote {root}/check.jpg")
    problems = [f"{len(errors)} bad rows"] if errors else []  # train.py reads all splits, and stops
    problems += [f"no {split} rows" for split in SPLITS if not counts[split]]
    if problems:
        raise InputError(f"training would fail: {', '.join(problems)}.")

def download(root):
    """Fetch RRSIS-D from the Hugging Face hub and unpack it into ROOT. Raises InputError."""
    from huggingface_hub import snapshot_download  # reads HF_ENDPOINT when it is imported
    images = root / "images" / "rrsisd" / "JPEGImages"
    with error_context(f"RRSIS-D (or put its files into {root}, see data.py, or set HF_ENDPOINT)"):
        names = ["*refs(unc).p", "*instances.json", "*JPEGImages.zip"]
        folder = Path(snapshot_download("VoyageWang/rrsis-d", repo_type="dataset", allow_patterns=names))
        (root / "rrsisd").mkdir(parents=True, exist_ok=True)
        for name in names[:2]:
            shutil.copy(next(folder.rglob(name)), root / "rrsisd")
        shutil.unpack_archive(next(folder.rglob(names[2])), images)
    for path in [*images.rglob("[!.]*.jpg")]:  # out of whatever folders the zip has
        path.rename(images / path.name)

def overlay(image, mask, colour=(255, 40, 40)):
    """RGB PIL image, mask (H, W) bool -> the image with the mask outlined and the rest darker."""
    mask = Image.fromarray(np.asarray(mask)).convert("L")
    picture = Image.composite(image, image.point(lambda value: int(0.65 * value)), mask)
    picture.paste(colour, mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(7)), mask))
    return picture

def heatmap(image, values, side):
    """RGB PIL image, tensor (h, w) -> the image (side, side), bright where the values are high."""
    values = values.cpu().numpy()
    light = 38 + 217 * (values - values.min()) / max(np.ptp(values), 1e-9)  # of 255: from 15 %
    light = Image.fromarray(light.astype(np.uint8)).resize((side, side), Image.BICUBIC)
    return ImageChops.multiply(image.resize((side, side)), light.convert("RGB"))

def contact_sheet(cells, columns, side):
    """[(caption, PIL image), ...] -> one PIL image, row by row, captions of up to two lines below."""
    rows = math.ceil(len(cells) / columns)
    # Gaps are 10 pixels wide, captions 44 high; a character takes about 7.
    sheet = Image.new("RGB", (columns * (side + 10), rows * (side + 44)), "white")
    for i, (caption, image) in enumerate(cells):
        x = i % columns * (side + 10)
        y = i // columns * (side + 44)
        sheet.paste(image.resize((side, side)), (x, y))
        text = "\n".join(textwrap.wrap(caption, side // 7)[:2])
        ImageDraw.Draw(sheet).text((x, y + side + 3), text, "black", ImageFont.load_default(13))
    return sheet

# --------------------------------------------------------------------------------------------------- toy
SCENE = 256  # side of a scene in pixels; it is drawn at three times the size and averaged
SIZES = {"small": 0.2, "large": 0.32}  # length as a share of the scene
COLOURS = {"white": (236, 236, 232), "gray": (112, 114, 120), "red": (188, 48, 42),
           "blue": (44, 84, 190), "yellow": (232, 196, 44)}
GROUNDS = ((96, 122, 70), (164, 138, 104), (158, 156, 150), (136, 140, 84))  # grass, soil, ...
LAND, BUSH, ROAD, SHORE, WATER, TAKEN = range(6)  # classes of a pixel of the terrain
TERRAIN_COLOURS = ((62, 94, 50), (98, 98, 98), (176, 164, 132), (36, 72, 92))  # from BUSH to WATER

def box(left, top, right, bottom, cut=0):
    """Polygon of a rectangle whose corners are cut off."""
    return [(left + cut, top), (right - cut, top), (right, top + cut), (right, bottom - cut),
            (right - cut, bottom), (left + cut, bottom), (left, bottom - cut), (left, top + cut)]

def disc(x, y, radius, start=0, stop=360):
    """Polygon of a disc, or of its sector between two angles in degrees."""
    angles = np.radians(np.linspace(start, stop, 31))
    return [(x, y), *zip(x + radius * np.cos(angles), y + radius * np.sin(angles))]

# category -> its name, its colours, and its parts in the order of drawing: a factor on the colour (0.2
# is dark as glass, 9 white) and a polygon in a square of 100, pointing right. The first is the outline.
OBJECTS = {
    "storagetank": ("storage tank", "white gray red blue yellow", [
        (0.7, disc(50, 50, 48)), (1, disc(50, 50, 41)), (0.88, disc(50, 50, 41, 0, 60)),
        (0.88, disc(50, 50, 41, 120, 180)), (0.88, disc(50, 50, 41, 240, 300))]),
    "tenniscourt": ("tennis court", "gray red blue yellow", [
        (1, box(2, 22, 98, 78)), (9, box(11, 29, 89, 71)), (1, box(13, 31, 30, 69)),
        (1, box(70, 31, 87, 69)), (1, box(32, 31, 49, 49)), (1, box(32, 51, 49, 69)),
        (1, box(51, 31, 68, 49)), (1, box(51, 51, 68, 69))]),
    "ship": ("ship", "white gray red blue yellow", [
        (1, [(0, 32), (62, 28), (100, 50), (62, 72), (0, 68)]),
        (0.8, [(6, 38), (60, 34), (88, 50), (60, 66), (6, 62)]),
        (0.5, box(11, 39, 35, 61)), (1, box(13, 41, 33, 59))]),
    "baseballfield": ("baseball field", "gray red yellow", [
        (9, disc(10, 90, 90, 270, 360)), (1, disc(13, 87, 87, 270, 360)), (9, box(13, 43, 57, 87)),
        (0.6, box(15, 45, 55, 85)), (1, disc(35, 65, 6))]),
    "vehicle": ("vehicle", "white gray red blue yellow", [
        (1, box(3, 27, 97, 73, 6)), (0.2, box(24, 30, 58, 33)), (0.2, box(24, 67, 58, 70)),
        (0.2, [(62, 34), (74, 30), (74, 70), (62, 66)]),
        (0.2, [(20, 34), (12, 31), (12, 69), (20, 66)])]),
    "airplane": ("airplane", "white gray red blue yellow", [
        (0.88, [(100, 45), (93, 40), (64, 40), (40, 2), (20, 2), (30, 40), (17, 40), (10, 24), (0, 24),
                (0, 76), (10, 76), (17, 60), (30, 60), (20, 98), (40, 98), (64, 60), (93, 60),
                (100, 55)]), (1, box(0, 40, 100, 60, 5)), (0.2, box(87, 45, 95, 55, 3))])}

def draw_terrain(rng):
    """Draw land with bushes, a road and a shore: a PIL image of classes, three times SCENE wide."""
    side = 3 * SCENE
    terrain = Image.new("P", (side, side), LAND)
    terrain.putpalette(np.uint8([GROUNDS[rng.integers(len(GROUNDS))], *TERRAIN_COLOURS]).tobytes())
    draw = ImageDraw.Draw(terrain)
    for x, y in rng.uniform(0, side, (80, 2)):
        radius = rng.uniform(3, 11)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=BUSH)
    start, stop = side * rng.uniform(-0.5, 1.5, 2)
    draw.line((-side, start, 2 * side, stop), fill=ROAD, width=side // 8)
    x = np.linspace(-side, 2 * side, 90)
    y = side * rng.uniform(0.2, 1.1) + rng.uniform(-0.5, 0.5) * (x - side / 2) + rng.normal(0, 4, 90)
    draw.line([*zip(x, y)], fill=SHORE, width=24)
    draw.polygon([*zip(x, y), (2 * side, 9 * side), (-side, 9 * side)], fill=WATER)
    return terrain.rotate(90 * int(rng.integers(4)))

def place_objects(rng, terrain):
    """Return up to five objects of three categories, on land or water; their places become TAKEN."""
    categories = rng.permutation(list(OBJECTS))[:3]
    tries = zip(rng.choice(categories, 60), rng.choice(list(SIZES), 60), rng.random((60, 4)))
    objects = []
    for category, size, (colour, x, y, turn) in tries:  # the four numbers are uniform in [0, 1)
        colours = OBJECTS[category][1].split()
        reach = 0.58 * SIZES[size]  # from the centre to the farthest corner
        item = SimpleNamespace(category=str(category), size=str(size), angle=2 * math.pi * turn,
                               colour=colours[int(colour * len(colours))],
                               x=reach + (1 - 2 * reach) * x, y=reach + (1 - 2 * reach) * y)
        area = terrain[int((item.y - reach) * SCENE):int((item.y + reach) * SCENE),
                       int((item.x - reach) * SCENE):int((item.x + reach) * SCENE)]
        free = area == WATER if item.category == "ship" else area <= BUSH
        if free.all() and len(objects) < 5:
            area[:] = TAKEN
            objects.append(item)
    return objects

# place -> (distance, inner, outer): the target is nearer than `inner`, its distractors are farther than
# `outer`. Positions between the two are ambiguous and get no such phrase.
PLACES = {
    "on the left": (lambda item: item.x, 0.36, 0.5),
    "on the right": (lambda item: 1 - item.x, 0.36, 0.5),
    "on the top": (lambda item: item.y, 0.36, 0.5),
    "on the bottom": (lambda item: 1 - item.y, 0.36, 0.5),
    "in the middle": (lambda item: max(abs(item.x - 0.5), abs(item.y - 0.5)), 0.15, 0.25),
    "on the upper left": (lambda item: max(item.x, item.y), 0.4, 0.52),
    "on the upper right": (lambda item: max(1 - item.x, item.y), 0.4, 0.52),
    "on the lower left": (lambda item: max(item.x, 1 - item.y), 0.4, 0.52),
    "on the lower right": (lambda item: max(1 - item.x, 1 - item.y), 0.4, 0.52)}
DIRECTIONS = ("right", "lower right", "bottom", "lower left", "left", "upper left", "top", "upper right")

def angle_to(anchor, direction, target):
    """Degrees between a direction and the line from the anchor to the target, 0 to 180."""
    angle = math.degrees(math.atan2(target.y - anchor.y, target.x - anchor.x))
    return abs((angle - 45 * DIRECTIONS.index(direction) + 180) % 360 - 180)

def name_object(objects, target, attributes):
    """("size", "colour") -> "small red ship", and its distractors: other objects with that name."""
    words = [getattr(target, attribute) for attribute in attributes] + [OBJECTS[target.category][0]]
    distractors = [other for other in objects if other is not target and all(
        getattr(other, key) == getattr(target, key) for key in ("category", *attributes))]
    return " ".join(words), distractors

def choose_phrase(rng, objects, target):
    """Return a phrase that is true of the target and clearly of no other object, or None."""
    spots = [(place, *limits) for place, limits in PLACES.items()]
    for anchor in objects:
        for attributes in ((), ("colour",)):
            name, distractors = name_object(objects, anchor, attributes)
            if anchor.category != target.category and not distractors:
                spots += [(f"on the {direction} of the {name}", partial(angle_to, anchor, direction),
                           20, 50) for direction in DIRECTIONS]
    found = []
    for attributes in ((), ("colour",), ("size",), ("size", "colour")):
        name, distractors = name_object(objects, target, attributes)
        if not distractors:
            found.append(name)
        for spot, distance, inner, outer in spots:
            if distance(target) < inner and all(distance(other) > outer for other in distractors):
                found.append(f"{name} {spot}")
    if not found:
        return None
    phrase = min(rng.choice(found, 3), key=len)  # short ones more often
    article = rng.choice(["The", "An" if phrase.startswith("a") else "A"])
    return f"{article} {phrase}"

def toy_tokenizer():
    """A word-level tokenizer for the toy's words. As in SigLIP: 0 <pad>, 1 </s> (appended), 2 <unk>."""
    names = [name for name, _, _ in OBJECTS.values()]
    words = " ".join(["a an the of", *COLOURS, *SIZES, *PLACES, *DIRECTIONS, *names]).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer

def toy_scene(seed, index):
    """Return a PIL image and four (object with its mask, phrase), the same for the same arguments."""
    rng = np.random.default_rng([seed, index])
    rows = []
    while len(rows) < 4:  # too few unique phrases: try another scene
        terrain = draw_terrain(rng)
        objects = place_objects(rng, np.asarray(terrain)[::3, ::3].copy())
        rows = [(item, choose_phrase(rng, objects, item)) for item in objects]
        rows = [(item, phrase) for item, phrase in rows if phrase]
    canvas = terrain.convert("RGB")
    draw = ImageDraw.Draw(canvas, "RGBA")
    for item in objects:
        colour = COLOURS[item.colour] + rng.normal(0, 6, 3)
        mask = Image.new("L", canvas.size)
        turn = ((math.cos(item.angle), math.sin(item.angle)),
                (-math.sin(item.angle), math.cos(item.angle)))
        for i, (factor, polygon) in enumerate(OBJECTS[item.category][2]):
            points = SIZES[item.size] * (np.array(polygon) / 100 - 0.5) @ turn
            points = canvas.width * (points + (item.x, item.y))
            if i == 0:  # the outline: the mask and a shadow
                ImageDraw.Draw(mask).polygon(points.flatten().tolist(), fill=1)
                draw.polygon((points + 10).flatten().tolist(), fill=(0, 0, 0, 110))
            fill = np.clip(factor * colour, 0, 255).astype(int)
            draw.polygon(points.flatten().tolist(), fill=tuple(fill))
        item.mask = np.asarray(mask)[1::3, 1::3] > 0
    light = 1
    for bumps, strength in ((5, 0.08), (24, 0.05), (120, 0.06)):  # smooth noise, coarse to fine
        noise = Image.fromarray(rng.normal(0, strength, (bumps, bumps)).astype(np.float32))
        light = light + np.asarray(noise.resize((SCENE, SCENE), Image.BICUBIC))[..., None]
    pixels = np.asarray(canvas.reduce(3)) * light + rng.normal(0, 3, (SCENE, SCENE, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image, [rows[i] for i in rng.permutation(len(rows))[:4]]

def write_toy(root, train=2800, val=100, test=320, seed=0):
    """Draw a toy data set into a folder. Raises InputError if it already holds one."""
    root = Path(root)
    if any((root / marker).exists() for marker, *_ in FORMATS.values()):
        raise InputError(f"{root} already holds a data set. Choose another folder or delete it.")
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    scenes = DataLoader(range(len(splits)), None, num_workers=2, collate_fn=partial(toy_scene, seed),
                        worker_init_fn=exit_with_parent)
    lines = []
    for index, (image, phrases) in enumerate(tqdm(scenes, f"drawing {root}")):
        name = f"{index:05d}.jpg"
        image.save(root / "images" / name, quality=95)
        for number, (item, phrase) in enumerate(phrases):
            mask = f"{index:05d}_{number}.png"
            Image.fromarray(item.mask).save(root / "masks" / mask)
            lines.append(json.dumps(dict(image=name, mask=mask, phrase=phrase, split=splits[index],
                                         category=item.category)))
    (root / "phrases.jsonl").write_text("\n".join(lines))  # last: it marks a complete data set
    print(f"wrote {root}: {4 * train} phrases for train, {4 * val} for val, {4 * test} for test")

# --------------------------------------------------------------------------------------------- commands
def rank_and_world_size():
    """Return the number of this process and of all processes; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def exit_with_parent(worker):
    """worker_init_fn of a DataLoader: on Linux no worker outlives the main process, waiting for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG

def run(main):
    """Run a command. Bad input ends it with one line and exit status 1 instead of a traceback."""
    with suppress(AttributeError):  # a notebook's stdout has no `reconfigure`
        sys.stdout.reconfigure(errors="backslashreplace")  # a console that is not UTF-8 shows "\u6f22"
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).partition('. ')[0]}. Lower --batch-size, or give "
                 "--checkpoint-activations.")
    except (InputError, OSError) as error:
        message = str(error)
        if "DataLoader worker" in message:  # the worker's traceback: its last line is the message
            message = message.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {message}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Check, download or draw a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="open every file, list every defect")
    command.add_argument("dir", type=Path)
    command.add_argument("--format", choices=list(FORMATS), help="default: detected from the folder")
    command = commands.add_parser("download", help="fetch from the Hugging Face hub, unpack, check")
    command.add_argument("dataset", choices=["rrsisd"])
    command.add_argument("dir", type=Path)
    command = commands.add_parser("toy", help="draw a toy data set of so many scenes")
    command.add_argument("dir", type=Path)
    for name, default in (("train", 2800), ("val", 100), ("test", 320), ("seed", 0)):
        command.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    if args.command == "check":
        check(args.dir, args.format)
    elif args.command == "download":
        download(args.dir)
        check(args.dir)
    else:
        write_toy(args.dir, args.train, args.val, args.test, args.seed)

if __name__ == "__main__":
    run(main)
