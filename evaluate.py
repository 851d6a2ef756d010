"""Score a checkpoint on one split of a data set, and draw what it got right and wrong.

    python evaluate.py runs/tiny/best.safetensors [--data DIR] [--split test] [--shuffle-phrases]
    python evaluate.py --bench b

Prints the metrics and a table by category; writes them, with every sample's IoU, as JSON next to the checkpoint, and a
sheet of pictures of the best, median and worst samples.

The rules, because papers differ: masks are compared at the image's original size. gIoU (elsewhere mIoU) is the mean over
samples of the foreground IoU; cIoU (elsewhere oIoU) is the sum of the intersections over the sum of the unions; Pr@X is the
share of samples with IoU > X (strictly; the LAVT family uses >=). A sample with empty target and empty prediction has IoU 1
and is counted in the output (the released code divides 0 by 0 there).
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import FORMATS, RefSegDataset, collate, image_tensor, leave_group, positive, read_image, run
from rsrefseg import SIGLIP_HUB, SIZES, RSRefSeg, heat, is_checkpoint, logits_at, overlay, read_checkpoint, usable_device

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def default_amp(device):
    """A key of AMP. Cards before Ampere only emulate bf16, slowly; the first card decides."""
    if not device.startswith("cuda"):
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def iou(intersection, union):
    return intersection / union if union else 1.0


def scores(rows):
    """Rows with the pixels of `intersection` and `union` -> {gIoU, cIoU, Pr@0.5 ... Pr@0.9} in percent, samples, both_empty."""
    each = np.array([iou(row["intersection"], row["union"]) for row in rows])
    intersections, unions = sum(row["intersection"] for row in rows), sum(row["union"] for row in rows)
    precision = {f"Pr@{x}": float(100 * (each > x).mean()) for x in THRESHOLDS}
    return {"gIoU": float(100 * each.mean()), "cIoU": 100 * iou(intersections, unions), **precision,
            "samples": len(rows), "both_empty": sum(row["union"] == 0 for row in rows)}


def processes():
    """-> the number of this process, and how many share the work, as torchrun started them; (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.inference_mode()
def evaluate(model, dataset, batch_size, amp=None, workers=0, shuffle_phrases=False):
    """A data set with one phrase an item -> one row each, in its order: {ref_id, image, phrase, category, intersection, union,
    iou}.

    `amp` is the autocast type or None. `shuffle_phrases` gives each image the phrase of a sample half a data set away: a
    model that reads the phrase fails then. Where several processes share the work each scores every n-th sample, once, and
    all get all rows.
    """
    model.eval()
    device, rows, (rank, world) = model.sam.mean.device, [], processes()
    shift = len(dataset.refs) // 2 if shuffle_phrases else 0
    phrase_for = {ref: other.phrase for ref, other in zip(dataset.refs, dataset.refs[shift:] + dataset.refs[:shift])}
    mine = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, mine), batch_size, collate_fn=collate, num_workers=workers, worker_init_fn=leave_group)
    with tqdm(total=len(mine), desc=f"evaluating {dataset.split}", unit="phrase", leave=False, disable=rank > 0) as bar:
        for batch in loader:
            phrases = [phrase_for[ref] for ref in batch["refs"]]
            ids, mask = model.read_phrases(phrases)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(batch["images"].to(device) / 255, ids, mask)
            for ref, phrase, target, one in zip(batch["refs"], phrases, batch["originals"], logits):
                found = (logits_at(one[None], model.image_size, *target.shape)[0] > 0).cpu().numpy()
                both, either = int((found & target).sum()), int((found | target).sum())
                rows.append(dict(ref_id=ref.ref_id, image=str(ref.image), phrase=phrase, category=ref.category,
                                 intersection=both, union=either, iou=iou(both, either)))
            bar.update(len(phrases))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, rows)
        rows = [shares[i % world][i // world] for i in range(len(dataset))]
    return rows


def line(split, result):
    """One line for logs: the split is part of it, because a score without its split says nothing."""
    precision = " ".join(f"Pr@{x} {result[f'Pr@{x}']:.1f}" for x in THRESHOLDS)
    empty = f", {result['both_empty']} with empty target and prediction" if result["both_empty"] else ""
    return f"{split} | gIoU {result['gIoU']:.2f} | cIoU {result['cIoU']:.2f} | {precision} | {result['samples']} phrases{empty}"


def table(categories):
    """{category: scores} -> a markdown table."""
    lines = ["| category | phrases | gIoU | cIoU | Pr@0.5 | Pr@0.9 |", "|---|---|---|---|---|---|"]
    lines += [f"| {name} | {r['samples']} | {r['gIoU']:.2f} | {r['cIoU']:.2f} | {r['Pr@0.5']:.1f} | {r['Pr@0.9']:.1f} |"
              for name, r in categories.items()]
    return "\n".join(lines)


def extremes(rows):
    """-> {title: positions} of the two best, median and worst rows."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["iou"])
    middle = max(0, len(order) // 2 - 1)
    return {"best": order[:2], "median": order[middle:middle + 2], "worst": order[-2:]}


@torch.inference_mode()
def picture_sheet(model, dataset, rows, chosen, side=224):
    """Samples as a paper shows them, one a line: image, mean of the word maps, sentence map, target, prediction; phrase and IoU
    below. `chosen` is {title: positions in rows}; -> PIL image."""
    font, device = ImageFont.load_default(14), model.sam.mean.device
    columns = ("image", "word maps, mean", "sentence map", "target", "prediction")
    sheet = Image.new("RGB", (len(columns) * (side + 6), 24 + sum(map(len, chosen.values())) * (side + 28)), "white")
    draw, top = ImageDraw.Draw(sheet), 24
    for i, title in enumerate(columns):
        draw.text((i * (side + 6), 4), title, fill="black", font=font)
    for title, index in ((title, index) for title, some in chosen.items() for index in some):
        row, image, taps = rows[index], read_image(rows[index]["image"]), {}
        ids, mask = model.read_phrases([row["phrase"]])
        logits = model(image_tensor(image, model.image_size)[None].to(device) / 255, ids, mask, taps)
        found = (logits_at(logits, model.image_size, image.height, image.width)[0] > 0).cpu().numpy()
        maps = taps["word_map"][0].mean(0), taps["sentence_map"][0].sigmoid()
        maps = [heat(image, values.float().cpu().numpy(), side) for values in maps]
        masks = [overlay(image, dataset[index]["originals"][0], (40, 255, 40)), overlay(image, found)]
        for i, picture in enumerate((image, *maps, *masks)):
            sheet.paste(picture.resize((side, side)), (i * (side + 6), top))
        draw.text((0, top + side + 4), f"{title}, IoU {row['iou']:.2f}:  {row['phrase'][:110]}", fill="black", font=font)
        top += side + 28
    return sheet


@torch.inference_mode()
def bench(size, batch_size, device, amp, calls=3):
    """Images a second (one phrase of 10 tokens each) and peak memory of a size with random weights: one line of text. The
    time does not depend on the weights; of `calls` calls after a first one the median counts."""
    model = RSRefSeg(size, dtype=amp or torch.float32, init=False).eval().to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    images = torch.rand(batch_size, 3, model.image_size, model.image_size, device=device)
    ids = torch.randint(3, 100, (batch_size, 10), device=device)
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        with torch.autocast(model.sam.mean.device.type, dtype=amp, enabled=amp is not None):
            model(images, ids).sum().item()                         # .item() waits until the device is done
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    if device.startswith("cuda"):
        peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    elif sys.platform == "linux":
        import resource                                             # not everywhere, and other systems count in other units
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    else:
        peak = "not measured here"
    kind = "fp32" if amp is None else str(amp).removeprefix("torch.")
    return (f"{size}, batch {batch_size}, {kind}, {device}: {batch_size / seconds:.2f} images/s, {seconds:.4f} s a call, "
            f"peak memory {peak}, torch {torch.__version__}")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Score a checkpoint, or time a size on this machine.")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?")
    add("--bench", nargs="?", choices=list(SIZES), const="b", help="time this size (default b) with random weights instead")
    add("--official", action="store_true", help="the checkpoint is one of the released code (.pth or .safetensors)")
    add("--data", type=Path, help="data folder, if not the one it was trained on")
    add("--dataset", choices=list(FORMATS), help="its format, if the folder does not tell")
    add("--split", default="test", choices=["train", "val", "test"])
    add("--shuffle-phrases", action="store_true", help="give each image another sample's phrase: the control")
    add("--batch-size", type=positive, help="default 16, with --bench 1")
    add("--workers", type=int, default=0)
    add("--amp", choices=list(AMP), help="autocast type (default: bf16 on CUDA, fp16 on its old cards, off elsewhere)")
    add("--siglip", help="file, folder or hub name, if not where training had it")
    add("--sam-weights", help="likewise for SAM")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.amp = args.amp or default_amp(args.device)
    if args.bench:
        print(bench(args.bench, args.batch_size or 1, args.device, AMP[args.amp]))
        return
    if args.checkpoint is None:
        parser.error("name the checkpoint to score, or give --bench")
    if args.official and is_checkpoint(args.checkpoint):
        raise ValueError(f"{args.checkpoint} is a checkpoint of train.py: leave out --official.")
    trained_on = {} if args.official else read_checkpoint(args.checkpoint)[0].get("args", {})
    data = args.data or trained_on.get("data")
    form = args.dataset or (None if args.data else trained_on.get("dataset"))
    if data is None:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on: give the data folder with --data.")
    dtype = AMP[args.amp] or torch.float32
    if args.official:
        model = RSRefSeg.load_official(args.checkpoint, args.siglip or SIGLIP_HUB, dtype=dtype).to(args.device)
    else:
        model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights, dtype).to(args.device)
    dataset = RefSegDataset(data, args.split, model.image_size, dataset=form)
    rows = evaluate(model, dataset, args.batch_size or 16, AMP[args.amp], args.workers, args.shuffle_phrases)
    result, names = scores(rows), sorted({row["category"] for row in rows})
    categories = {name: scores([row for row in rows if row["category"] == name]) for name in names}
    print(table(categories))
    print(line(args.split + " with shuffled phrases" * args.shuffle_phrases, result))
    name = f"{args.checkpoint.with_suffix('')}.{args.split}{'.shuffled' * args.shuffle_phrases}"
    report = dict(checkpoint=str(args.checkpoint), data=str(data), split=args.split, shuffled=args.shuffle_phrases,
                  amp=args.amp, metrics=result, categories=categories, samples=rows)
    Path(f"{name}.json").write_text(json.dumps(report, indent=1))
    with torch.autocast(torch.device(args.device).type, dtype=AMP[args.amp], enabled=args.amp != "off"):
        picture_sheet(model, dataset, rows, extremes(rows)).save(f"{name}.jpg", quality=90)
    print(f"wrote {name}.json and {name}.jpg")


if __name__ == "__main__":
    run(main)
