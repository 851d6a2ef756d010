"""Score a checkpoint on one split of a data set, and draw its best, median and worst samples.

    python evaluate.py runs/tiny/best.safetensors [--data DIR] [--split test] [--shuffle-phrases]

Papers differ in their rules; these are RSRefSeg's. Masks are compared at the image's original size.
gIoU (elsewhere mIoU) is the mean over samples of the foreground IoU. cIoU (elsewhere oIoU) is the sum
of all intersections over the sum of all unions. Pr@X is the share of samples with IoU > X; LAVT and its
successors use >=. A sample with empty target and prediction has IoU 1, and the output says how many
there are; the released code divides 0 by 0.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import FORMATS, SPLITS, InputError, RefSegDataset, collate, contact_sheet, heatmap, overlay
from data import exit_with_parent, rank_and_world_size, read_image, run
from rsrefseg import AMP, DEVICE, RSRefSeg, autocast, default_amp

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

def iou(intersection, union):
    return intersection / union if union else 1.0

def metrics(rows):
    """Rows with pixel counts `intersection` and `union` -> {gIoU, cIoU, Pr@0.5 ... Pr@0.9} in percent,
    and the numbers of samples and of samples with empty target and prediction."""
    ious = np.array([iou(row["intersection"], row["union"]) for row in rows])
    intersection = sum(row["intersection"] for row in rows)
    union = sum(row["union"] for row in rows)
    result = {"gIoU": 100 * float(ious.mean()), "cIoU": 100 * iou(intersection, union)}
    for threshold in THRESHOLDS:
        result[f"Pr@{threshold}"] = 100 * float((ious > threshold).mean())
    return dict(result, samples=len(rows), both_empty=sum(row["union"] == 0 for row in rows))

@torch.inference_mode()
def evaluate(model, dataset, batch_size, amp="off", workers=0, mask_folder=None):
    """A data set with one phrase per item -> a row per item, in order: index, ref_id, image, phrase,
    category, intersection, union, iou. Leaves the model in eval mode. `mask_folder`
    receives the predicted masks. Several processes share the work, and all return all rows."""
    model.eval()
    rank, world_size = rank_and_world_size()
    if world_size > 1:
        for buffer in model.buffers():       # BatchNorm's statistics: a CPU has no SyncBatchNorm
            dist.broadcast(buffer, 0)
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(Subset(dataset, indices), batch_size, collate_fn=collate, num_workers=workers,
                        worker_init_fn=exit_with_parent)
    rows = []
    for batch in tqdm(loader, f"evaluating {dataset.split}", leave=False, disable=rank > 0):
        images = batch["images"].to(model.device) / 255
        with autocast(model.device, amp):
            output = model(images, *model.tokenize([ref.phrase for ref in batch["refs"]]))
        # originals: the targets, (H, W) bool arrays at the size of their images
        for ref, target, logits in zip(batch["refs"], batch["originals"], output.logits.split(1)):
            logits = model.resize_logits(logits, *target.shape)[0]
            mask = (logits > 0).cpu().numpy()
            intersection = int((mask & target).sum())
            union = int((mask | target).sum())
            index = indices[len(rows)]                         # the next one of this process
            rows.append(dict(index=index, ref_id=ref.ref_id, image=str(ref.image), phrase=ref.phrase,
                             category=ref.category, intersection=intersection, union=union,
                             iou=iou(intersection, union)))
            if mask_folder:
                Image.fromarray(mask).save(mask_folder / f"{index:06d}.png")
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, rows)
        rows = sorted(sum(parts, []), key=lambda row: row["index"])
    return rows

def format_record(title, record):
    """Returns one line, "title | name value | name value". Format # keeps the last zero of 95.70."""
    parts = [title]
    for name, value in record.items():
        parts.append(f"{name} {value:#.4g}" if isinstance(value, float) else f"{name} {value}")
    return " | ".join(parts)

def log(folder, kind, step, record):
    """Print a record and append it to log.jsonl. After a crash steps may repeat: the last counts."""
    if rank_and_world_size()[0] == 0:
        with tqdm.external_write_mode():               # moves the progress bar out of the way
            print(format_record(f"{kind} step {step}", record), flush=True)
        row = dict(kind=kind, step=step)
        for name, value in record.items():
            row[name] = value if math.isfinite(value) else None        # JSON has no NaN
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

def category_table(rows):
    """Returns a markdown table of the metrics by category."""
    lines = ["| category | phrases | gIoU | cIoU | Pr@0.5 | Pr@0.9 |", "|---|---|---|---|---|---|"]
    for category in sorted({row["category"] for row in rows}):
        r = metrics([row for row in rows if row["category"] == category])
        lines.append(f"| {category} | {r['samples']} | {r['gIoU']:.2f} | {r['cIoU']:.2f} "
                     f"| {r['Pr@0.5']:.1f} | {r['Pr@0.9']:.1f} |")
    return "\n".join(lines)

def best_median_worst(rows):
    """Returns the indices of the two best, two median and two worst rows."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["iou"])
    middle = len(order) // 2
    return [*order[:2], *order[middle - 1:middle + 1], *order[-2:]]

@torch.inference_mode()
def explain(model, image, phrase, side=224):
    """Returns [(caption, picture)]: image, word map of each token, their mean, sentence map, mask."""
    ids, token_mask = model.tokenize([phrase])
    output = model.predict(image, ids, token_mask)
    word_map = output.word_map[0]                               # (L, g, g): one phrase, no padding
    maps = [*word_map, word_map.mean(0), output.sentence_map[0].sigmoid()]
    tokens = [model.tokenizer.id_to_token(i).strip("▁") for i in ids[0].tolist()]
    names = [f"word map: {token}" for token in tokens] + ["mean word map", "sentence map"]
    cells = [(phrase, image)]
    for name, values in zip(names, maps):
        cells.append((f"{name}, {values.min():.2g} to {values.max():.2g}", heatmap(image, values, side)))
    mask = model.resize_logits(output.logits, image.height, image.width)[0].cpu() > 0
    return [*cells, ("mask", overlay(image, mask))]

def picture_sheet(model, dataset, rows, indices, side=224):
    """Returns a contact sheet, a line a sample: image, mean word map, sentence map, mask, target."""
    cells = []
    for index in indices:
        row = rows[index]
        image = read_image(row["image"])
        drawn = explain(model, image, row["phrase"], side)
        target = overlay(image, dataset[index]["originals"][0], (40, 255, 40))
        cells += [drawn[0], *drawn[-3:], (f"target, IoU {row['iou']:.2f}", target)]
    return contact_sheet(cells, 5, side)

def shuffle_phrases(dataset):
    """The negative control: give each image the phrase of the row half a data set away."""
    refs = dataset.refs
    for i, ref in enumerate(refs):
        other = refs[(i + len(refs) // 2) % len(refs)]
        dataset.items[i] = [ref._replace(phrase=other.phrase)]         # an item is a list of refs

def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a checkpoint on one split of a data set.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="of train.py or of the released code")
    add("--data", type=Path, help="data folder, if not the one it was trained on")
    add("--format", choices=list(FORMATS), help="format of --data, if the folder does not tell")
    add("--split", default="test", choices=SPLITS, help="default: test")
    add("--shuffle-phrases", action="store_true", help="negative control: other phrases")
    add("--save-masks", type=Path, metavar="DIR", help="also write each predicted mask")
    add("--batch-size", type=int, default=8, help="default: 8")
    add("--workers", type=int, default=2, help="processes that read images (default: 2)")
    add("--siglip", help="SigLIP weights, if they moved: file, folder or Hugging Face name")
    add("--sam-weights", help="SAM weights, if they moved")
    add("--device", default=DEVICE, help=f"default: {DEVICE}")
    add("--amp", choices=list(AMP), help="autocast type (default: what the device computes fastest)")
    args = parser.parse_args(argv)
    args.amp = args.amp or default_amp(args.device)
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights, AMP[args.amp])
    model.to(args.device)
    data = args.data or model.metadata.get("data")
    if data is None:
        raise InputError(f"{args.checkpoint} does not say what it was trained on: give --data.")
    format = args.format
    if args.data is None and format is None:
        format = model.metadata.get("format")
    dataset = RefSegDataset(data, args.split, model.image_size, format=format)
    if args.shuffle_phrases:
        shuffle_phrases(dataset)
    if args.save_masks:
        args.save_masks.mkdir(parents=True, exist_ok=True)
    rows = evaluate(model, dataset, args.batch_size, args.amp, args.workers, args.save_masks)
    result = metrics(rows)
    name = f"shuffled.{args.split}" if args.shuffle_phrases else args.split
    if args.data:
        name = f"{args.data.name}.{name}"
    base = args.checkpoint
    if not base.exists():                                      # a Hugging Face name: write here
        base = Path(base.name)
    stem = f"{base.with_suffix('')}.{name}"
    report = dict(checkpoint=str(args.checkpoint), data=str(data), split=args.split, amp=args.amp,
                  shuffled=args.shuffle_phrases, metrics=result, samples=rows)
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1))
    print(category_table(rows))
    print(format_record(name, result))
    with autocast(args.device, args.amp):
        sheet = picture_sheet(model, dataset, rows, best_median_worst(rows))
    sheet.save(f"{stem}.jpg", quality=90)
    print(f"wrote {stem}.json and {stem}.jpg")

if __name__ == "__main__":
    run(main)
