"""Data sets of aerial images with phrases and masks, and a toy data set that is drawn.

    RRSIS-D     rrsisd/refs(unc).p, rrsisd/instances.json, images/rrsisd/JPEGImages/*.jpg
    RefSegRS    output_phrase_{train,val,test}.txt of "<id> <phrase>", images/<id>.tif, masks/<id>.tif
    RISBench    img_rgb/*.png with output_phrase_{split}.txt and mask/*.png, or with *.jsonl of
                {split, file_name, sent, segmentation: {size, counts}}
    own         phrases.jsonl of {image, mask, phrase, split}, images/, masks/ (foreground is above 0)

`python data.py check DIR` opens every file and lists every defect, `download rrsisd DIR` fetches a set,
`toy DIR` draws the toy, in the format `own`. A phrase names an object by colour, size, place or
neighbour and is true of it alone, although most objects stand beside others of their class.
Shapes: B images, k phrases per image, N = B k, S side of the model's input, H W an image's size.
"""
import argparse
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import textwrap
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


# ---------------------------------------------------------------------------------- rows and their files

# One row: a phrase and the mask of what it names. Where a data set has none, ref_id is "file:line" and
# category "-". mask is the Path of an image, or COCO's {"size": [H, W], "counts": string}.
Ref = namedtuple("Ref", "ref_id split image phrase category mask")
# For other formats, such as EPS, Pillow may start an external program.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")


def to_rgb(image):
    """PIL image of any mode -> RGB. Grey values of more than 8 bits are stretched from their 2nd to
    their 98th percentile; those that are not finite, or "no data" in a GeoTIFF, become black."""
    if image.mode.startswith(("I", "F")):
        values = np.array(image, dtype=np.float32)
        no_data = getattr(image, "tag_v2", {}).get(42113, "").strip(" \0")  # GDAL_NODATA, a string
        valid = np.isfinite(values) & (values != np.float32(no_data or "nan"))
        low, high = np.percentile(values[valid], (2, 98)) if valid.any() else (0, 1)
        if low == high and valid.any():  # nearly all pixels have one value: a scene at night, radar
            low, high = values[valid].min(), values[valid].max()
        values = np.clip((values - low) * (255 / max(high - low, 1e-9)), 0, 255)
        image = Image.fromarray(np.where(valid, values, 0).round().astype(np.uint8))
    return image.convert("RGB")


def read_image(path, convert=to_rgb):
    """Return an image file as an RGB PIL image. Raises FileNotFoundError, or ValueError if damaged."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return convert(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image.") from None
    except Exception as error:  # each decoder raises its own classes
        raise ValueError(f"cannot read image {path}: {error}. Fetch or convert it again.") from error


def image_tensor(image, side):
    """RGB PIL image -> (3, side, side) uint8, bilinear. The aspect ratio is not kept."""
    return torch.from_numpy(np.array(image.resize((side, side), Image.BILINEAR))).permute(2, 0, 1)


def tile_starts(length, tile):
    """Returns where windows start along one side, so that neighbours overlap by at least half."""
    steps = math.ceil(2 * (length - tile) / tile)
    return [round(i * (length - tile) / max(1, steps)) for i in range(steps + 1)]


def resize_mask(mask, height, width):
    """(H, W) bool -> (height, width) bool, nearest."""
    return np.array(Image.fromarray(mask).resize((width, height), Image.NEAREST))


def decode_rle(counts, height, width):
    """COCO's compressed run lengths -> mask (height, width) bool. Raises ValueError. Runs of 0s and 1s
    alternate, column by column. A run is a number in base 32, lowest digit first: the last is character
    48 + digit, the others 80 + digit. From the fourth run on it is the change from two runs before."""
    runs = []
    for number in re.findall("[P-o]*[0-O]", counts):
        value = sum(((ord(digit) - 48) & 31) << 5 * i for i, digit in enumerate(number))
        if (ord(number[-1]) - 48) & 16:  # negative
            value -= 1 << 5 * len(number)
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
    if sum(runs) != height * width or min(runs) < 0:
        raise ValueError(f"the run lengths do not add up to {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


# -------------------------------------------------------------------------------------------- data sets

def read_lines(path, parse=str):
    """Yield ("file:line", parsed text) of the lines that are not blank."""
    for i, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"{path.stem}:{i}", parse(line.strip())


class PlainUnpickler(pickle.Unpickler):
    """Loads plain data. A pickle that names a class or a function could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the pickle would call {module}.{name}")


def read_rrsisd(root):
    with open(root / "rrsisd" / "refs(unc).p", "rb") as file:
        rows = PlainUnpickler(file).load()
    instances = json.loads((root / "rrsisd" / "instances.json").read_text("utf-8"))
    names = {row["id"]: row["name"] for row in instances["categories"]}
    masks = {row["id"]: row["segmentation"][0] for row in instances["annotations"]}
    images = root / "images" / "rrsisd" / "JPEGImages"
    for row in rows:
        yield Ref(row["ref_id"], row["split"], images / row["file_name"],
                  row["sentences"][0]["sent"].strip(), names[row["category_id"]], masks[row["ann_id"]])


def read_own(root):
    for ref_id, row in read_lines(root / "phrases.jsonl", json.loads):
        yield Ref(ref_id, row["split"], root / "images" / row["image"], row["phrase"].strip(),
                  row.get("category", "-"), root / "masks" / row["mask"])


def read_risbench(root):
    files = sorted(root.glob("*.jsonl"))
    rows = (row for path in files for row in read_lines(path, json.loads))
    for ref_id, row in rows:
        yield Ref(ref_id, row["split"], root / "img_rgb" / row["file_name"], row["sent"].strip(), "-",
                  row["segmentation"])
    if not files:
        yield from read_refsegrs(root, "img_rgb", "mask", ".png")


def read_refsegrs(root, images="images", masks="masks", suffix=".tif"):
    for split in SPLITS:
        for ref_id, line in read_lines(root / f"output_phrase_{split}.txt"):
            name, _, phrase = line.partition(" ")
            file = name.removesuffix(suffix) + suffix
            yield Ref(ref_id, split, root / images / file, phrase.strip(), "-", root / masks / file)


SPLITS = ("train", "val", "test")
FORMATS = {  # name -> what identifies it, tried in this order; its reader; its published phrases
    "rrsisd": ("rrsisd", read_rrsisd, "train 12,181, val 1,740, test 3,481"),
    "own": ("phrases.jsonl", read_own, "-"),
    "risbench": ("img_rgb", read_risbench, "train 26,300, val 10,013, test 16,159"),
    "refsegrs": ("output_phrase_train.txt", read_refsegrs, "train 2,172, val 431, test 1,817")}
HUB = {  # repository, where its zip goes, a file at the top of the zip
    "rrsisd": ("VoyageWang/rrsis-d", "images/rrsisd/JPEGImages", "[!.]*.jpg"),
    "refsegrs": ("JessicaYuan/RefSegRS", "", "output_phrase_train.txt")}


def read_refs(root, dataset=None):
    """Return a data set's name and all its rows. `dataset` is a name in FORMATS; None detects it.
    Raises FileNotFoundError if there is no data set, ValueError if its lists are damaged."""
    root = Path(root)
    found = [name for name, (marker, *_) in FORMATS.items() if (root / marker).exists()]
    if not found and not dataset:
        raise FileNotFoundError(f"no data set in {root.absolute()}: name another, or see data.py.")
    dataset = dataset or found[0]
    refs = []
    try:
        for ref in FORMATS[dataset][1](root):
            if ref.split not in SPLITS:
                raise ValueError(f"split {ref.split!r} is not in {SPLITS}")
            refs.append(ref)
    except Exception as error:  # whatever a damaged or missing list causes
        raise ValueError(f"{root}: cannot read {dataset} after row {refs[-1].ref_id if refs else 0}, "
                         f"{type(error).__name__}: {error}. Correct it or fetch it again.") from error
    return dataset, refs


def binarize(image):
    """Mask image of any mode -> (H, W) bool, True above 0."""
    if len(image.getbands()) == 1 and image.mode != "P":
        return np.asarray(image) > 0
    return np.asarray(image.convert("RGB")).any(-1)


def read_mask(ref):
    """Return the stored mask of a row, (H, W) bool. Raises FileNotFoundError or ValueError."""
    if isinstance(ref.mask, Path):
        return read_image(ref.mask, binarize)
    try:
        return decode_rle(ref.mask["counts"], *ref.mask["size"])
    except Exception as error:
        raise ValueError(f"mask of ref_id {ref.ref_id} ({ref.image.name}): {error}.") from error


class RefSegDataset(Dataset):
    """One split of a data set. An item is a dict of an image with k = `phrases` phrases: image (3, S, S)
    uint8, masks (k, 1, S, S) bool, originals, the k masks (H, W) bool at the image's size, refs, k rows.
    With k = 1, as in the paper, every phrase is an item; else an image's phrases are dealt out k at a
    time, the last group filled up from the first. Raises ValueError for missing files or phrases."""

    def __init__(self, root, split, side, phrases=1, dataset=None):
        self.split = split
        self.side = side
        self.refs = [ref for ref in read_refs(root, dataset)[1] if ref.split == split]
        problems = [f"the phrase of ref_id {ref.ref_id} ({ref.image.name}) is empty"
                    for ref in self.refs if not re.search(r"[^\W_]", ref.phrase)]
        files = {path for ref in self.refs for path in (ref.image, ref.mask) if isinstance(path, Path)}
        problems += [f"{path} is missing" for path in sorted(files) if not path.is_file()]
        if problems or not self.refs:
            text = f"{len(problems)} problems to correct: {', '.join(problems[:5])}"
            raise ValueError(f"the {split} split of {root} has {text if problems else 'no phrases'}.")
        groups = {}
        for i, ref in enumerate(self.refs):
            groups.setdefault(ref.image if phrases > 1 else i, []).append(ref)
        self.items = [[group[(start + i) % len(group)] for i in range(phrases)]
                      for group in groups.values() for start in range(0, len(group), phrases)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        refs = self.items[index]
        image = read_image(refs[0].image)
        # Two masks of RRSIS-D differ in size from their image.
        originals = [resize_mask(read_mask(ref), image.height, image.width) for ref in refs]
        masks = np.stack([resize_mask(mask, self.side, self.side) for mask in originals])
        return dict(image=image_tensor(image, self.side), masks=torch.from_numpy(masks)[:, None],
                    originals=originals, refs=refs)

    def __str__(self):
        return f"{self.split}: {len(self.refs):,} phrases"


def collate(items):
    """Items -> images (B, 3, S, S) uint8, masks (N, 1, S, S) bool, originals, refs."""
    return dict(images=torch.stack([item["image"] for item in items]),
                masks=torch.cat([item["masks"] for item in items]),
                originals=[mask for item in items for mask in item["originals"]],
                refs=[ref for item in items for ref in item["refs"]])


# ----------------------------------------------------------------------------- check, download, pictures

def check_row(ref):
    """Open a row's image and mask. Returns its defects [("error" or "warning", text)]."""
    row = f"{ref.split}, ref_id {ref.ref_id}, {ref.image.name}"
    defects = []
    if not re.search(r"[^\W_]", ref.phrase):
        defects.append(("error", f"{row}: the phrase {ref.phrase!r} is empty"))
    try:
        image = read_image(ref.image)
        mask = read_mask(ref)
    except (OSError, ValueError) as error:
        return [*defects, ("error", f"{row}: {error}")]
    if mask.shape != (image.height, image.width):
        defects.append(("warning", f"{row}: the mask has another size than the image"))
    if not mask.any():
        defects.append(("warning", f"{row}: the mask is empty"))
    return defects


def check(root, dataset=None):
    """Open every image and mask of a data set, print its size and its defects, and write samples to
    ROOT/check.jpg. Raises ValueError at the end if training would fail."""
    root = Path(root)
    dataset, refs = read_refs(root, dataset)
    found = [check_row(ref) for ref in tqdm(refs, f"checking {root}")]
    counts = dict(Counter(ref.split for ref in refs))
    print(f"{dataset}: {counts} phrases. Published: {FORMATS[dataset][2]}")
    for kind, text in sum(found, []):
        print(f"{kind}: {text}")
    good = [ref for ref, defects in zip(refs, found) if "error" not in dict(defects)]
    cells = []
    for ref in good[::len(good) // 12 + 1]:  # up to 12
        image = read_image(ref.image).resize((300, 300))
        picture = overlay(image, resize_mask(read_mask(ref), 300, 300))
        cells.append((f"{ref.split}: {ref.phrase}", picture))
    if cells:
        contact_sheet(cells, 4, 300).save(root / "check.jpg", quality=90)
        print(f"wrote {root}/check.jpg")
    if len(good) < len(refs) or len(counts) < 3:
        raise ValueError(f"training would fail: {len(refs) - len(good)} bad rows, phrases {counts}.")


def download(dataset, root):
    """Fetch a data set from the Hugging Face hub and unpack it into ROOT. Raises OSError."""
    from huggingface_hub import snapshot_download  # reads HF_ENDPOINT when it is imported
    repository, images, marker = HUB[dataset]
    patterns = ["*JPEGImages.zip", "*instances.json", "*refs(unc).p", "*RefSegRS.zip"]
    folder = snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    for path in [path for pattern in patterns for path in Path(folder).rglob(pattern)]:
        if path.suffix == ".zip":
            print(f"unpacking {path}")
            temporary = Path(root) / "unpacked"
            shutil.unpack_archive(path, temporary)
            top = next(temporary.rglob(marker)).parent  # whatever folders the zip has above it
            shutil.copytree(top, Path(root) / images, copy_function=shutil.move, dirs_exist_ok=True)
            shutil.rmtree(temporary)
        else:
            Path(root, "rrsisd").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(root, "rrsisd"))


def overlay(image, mask, colour=(255, 40, 40)):
    """RGB PIL image, mask (H, W) bool -> the image with the mask outlined and the rest darker."""
    mask = Image.fromarray(np.asarray(mask)).convert("L")
    picture = Image.composite(image, image.point(lambda value: int(0.65 * value)), mask)
    for width, line in ((7, (255, 255, 255)), (5, colour)):
        picture.paste(line, mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(width)), mask))
    return picture


def heatmap(image, values, side):
    """RGB PIL image, tensor (h, w) -> the image (side, side), bright where the values are high."""
    values = values.cpu().numpy()
    values = (values - values.min()) / max(np.ptp(values), 1e-9)
    light = Image.fromarray((255 * values).astype(np.uint8))
    image = image.resize((side, side))
    dark = image.point(lambda value: int(0.15 * value))
    return Image.composite(image, dark, light.resize((side, side), Image.BICUBIC))


def contact_sheet(cells, columns, side):
    """[(caption, PIL image), ...] -> one PIL image, row by row, captions of up to two lines below."""
    rows = math.ceil(len(cells) / columns)
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
    """Return up to five objects of three categories, ships on water, others on land, none near another.
    x and y are in [0, 1]. The squares of the terrain (SCENE, SCENE) that they cover become TAKEN."""
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
    """Draw a toy data set into a folder. Raises ValueError if it already holds one."""
    root = Path(root)
    if any((root / marker).exists() for marker, *_ in FORMATS.values()):
        raise ValueError(f"{root} already holds a data set. Choose another folder or delete it.")
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    scenes = DataLoader(range(len(splits)), batch_size=None, collate_fn=partial(toy_scene, seed),
                        num_workers=2, worker_init_fn=worker_init)
    lines = []
    for index, (image, phrases) in enumerate(tqdm(scenes, f"drawing {root}")):
        name = f"{index:05d}.jpg"
        image.save(root / "images" / name, quality=95)
        for number, (item, phrase) in enumerate(phrases):
            mask = f"{index:05d}_{number}.png"
            Image.fromarray(item.mask).save(root / "masks" / mask)
            row = dict(image=name, mask=mask, phrase=phrase, split=splits[index], category=item.category)
            lines.append(json.dumps(row))
    (root / "phrases.jsonl").write_text("\n".join(lines))  # last: it marks a complete data set


# --------------------------------------------------------------------------------------------- commands

def worker_init(worker):
    """worker_init_fn of a DataLoader. Ctrl-C is for the main process: it finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def run(main):
    """Run a command. Bad input ends it with one line and exit status 1 instead of a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        text = str(error)
        if "DataLoader worker" in text:  # the worker's traceback: its last line is the message
            text = text.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {text}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check, download or draw a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="open every file, list every defect")
    command.add_argument("dir", type=Path)
    command.add_argument("--dataset", choices=list(FORMATS), help="default: detected from the folder")
    command = commands.add_parser("download", help="fetch from the Hugging Face hub, unpack, check")
    command.add_argument("dataset", choices=list(HUB))
    command.add_argument("dir", type=Path)
    command = commands.add_parser("toy", help="draw a toy data set")
    command.add_argument("dir", type=Path)
    command.add_argument("--train", type=int, default=2800, help="scenes (default: 2800)")
    command.add_argument("--val", type=int, default=100, help="default: 100")
    command.add_argument("--test", type=int, default=320, help="default: 320")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    if args.command == "toy":
        write_toy(args.dir, args.train, args.val, args.test, args.seed)
        return
    if args.command == "download":
        download(args.dataset, args.dir)
    check(args.dir, args.dataset)


if __name__ == "__main__":
    run(main)
