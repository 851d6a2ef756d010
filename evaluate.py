"""Score a checkpoint on one split of a data set, and draw its best, median and worst samples.

    python evaluate.py runs/tiny/best.safetensors [--data DIR] [--split test] [--shuffle-phrases]
    python evaluate.py --bench b

Papers differ in their rules; these are RSRefSeg's. Masks are compared at the image's original size.
gIoU (elsewhere mIoU) is the mean over samples of the foreground IoU. cIoU (elsewhere oIoU) is the sum
of all intersections over the sum of all unions. Pr@X is the share of samples with IoU > X; LAVT and its
successors use >=. A sample with empty target and prediction has IoU 1, and the output says how many
there are; the released code divides 0 by 0.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import FORMATS, SPLITS, RefSegDataset, collate, worker_init
from data import contact_sheet, heatmap, overlay, read_image, run
from rsrefseg import AMP, DEFAULT_AMP, DEVICE, SIGLIP_SIZE
from rsrefseg import RSRefSeg, autocast, read_checkpoint, resize_logits
from siglip import canonical

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def iou(intersection, union):
    return intersection / union if union else 1.0


def scores(rows):
    """Rows with the pixels of `intersection` and `union` -> {gIoU, cIoU, Pr@0.5 ... Pr@0.9} in percent,
    and the numbers of samples and of samples with empty target and prediction."""
    ious = np.array([iou(row["intersection"], row["union"]) for row in rows])
    intersection = sum(row["intersection"] for row in rows)
    union = sum(row["union"] for row in rows)
    result = {"gIoU": 100 * float(ious.mean()), "cIoU": 100 * iou(intersection, union)}
    for threshold in THRESHOLDS:
        result[f"Pr@{threshold}"] = 100 * float((ious > threshold).mean())
    return dict(result, samples=len(rows), both_empty=sum(row["union"] == 0 for row in rows))


def rank_and_world_size():
    """Returns the number of this process and of all processes; (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.inference_mode()
def evaluate(model, dataset, batch_size, amp="off", workers=0, shuffle_phrases=False):
    """A data set with one phrase per item -> a row per item, in order: ref_id, image, phrase, category,
    intersection, union, iou. Leaves the model in eval mode.

    `shuffle_phrases` is the negative control: each image gets the phrase of the sample half a data set
    away. Several processes share the work: each scores every world_size-th sample, and all return all
    rows.
    """
    model.eval()
    rank, world_size = rank_and_world_size()
    if world_size > 1:
        for buffer in model.buffers():         # statistics of BatchNorm, which only CUDA synchronises
            dist.broadcast(buffer, 0)
    shift = len(dataset) // 2 if shuffle_phrases else 0
    indices = range(rank, len(dataset), world_size)
    phrases = [dataset.refs[(index + shift) % len(dataset)].phrase for index in indices]
    loader = DataLoader(Subset(dataset, indices), batch_size, collate_fn=collate, num_workers=workers,
                        worker_init_fn=worker_init)
    rows = []
    for batch in tqdm(loader, f"evaluating {dataset.split}", leave=False, disable=rank > 0):
        refs = batch["refs"]
        given = phrases[len(rows):len(rows) + len(refs)]       # those of this batch
        with autocast(model.device, amp):
            logits = model(batch["images"].to(model.device) / 255, *model.tokenize(given))
        for ref, phrase, target, logit in zip(refs, given, batch["originals"], logits):
            mask = resize_logits(logit[None], model.image_size, *target.shape)[0] > 0
            mask = mask.cpu().numpy()
            intersection = int((mask & target).sum())
            union = int((mask | target).sum())
            rows.append(dict(ref_id=ref.ref_id, image=str(ref.image), phrase=phrase,
                             category=ref.category, intersection=intersection, union=union,
                             iou=iou(intersection, union)))
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, rows)
        rows = [parts[i % world_size][i // world_size] for i in range(len(dataset))]        # in order
    return rows


def format_record(title, record):
    """Returns one line, "title | name value | name value"."""
    parts = [title]
    for name, value in record.items():
        parts.append(f"{name} {value:#.4g}" if isinstance(value, float) else f"{name} {value}")
    return " | ".join(parts)


def category_table(rows):
    """Returns a markdown table of the scores by category."""
    lines = ["| category | phrases | gIoU | cIoU | Pr@0.5 | Pr@0.9 |", "|---|---|---|---|---|---|"]
    for category in sorted({row["category"] for row in rows}):
        r = scores([row for row in rows if row["category"] == category])
        lines.append(f"| {category} | {r['samples']} | {r['gIoU']:.2f} | {r['cIoU']:.2f} "
                     f"| {r['Pr@0.5']:.1f} | {r['Pr@0.9']:.1f} |")
    return "\n".join(lines)


def best_median_worst(rows):
    """Returns the indices of the two best, two median and two worst rows."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["iou"])
    middle = len(order) // 2
    return [*order[:2], *order[middle - 1:middle + 1], *order[-2:]]


def picture_sheet(model, dataset, rows, indices, side=224):
    """Returns a contact sheet, a line per sample: image, word maps, sentence map, target, prediction."""
    cells = []
    for index in indices:
        row = rows[index]
        image = read_image(row["image"])
        intermediates = {}
        masks, _ = model.segment(image, row["phrase"], intermediates=intermediates)
        word_map = intermediates["word_map"][0].mean(0)
        sentence_map = intermediates["sentence_map"][0].sigmoid()
        target = overlay(image, dataset[index]["originals"][0], (40, 255, 40))
        cells += [(row["phrase"], image), ("word maps, mean", heatmap(image, word_map, side)),
                  ("sentence map", heatmap(image, sentence_map, side)), ("target", target),
                  (f"prediction, IoU {row['iou']:.2f}", overlay(image, masks[0]))]
    return contact_sheet(cells, 5, side)


def explain(model, image, phrase, side=256):
    """Returns a contact sheet: image, map of each token, their mean, sentence map, mask."""
    intermediates = {}
    masks, _ = model.segment(image, phrase, intermediates=intermediates)
    word_map = intermediates["word_map"][0]
    tokens = model.tokenizer.encode(canonical(phrase)).tokens
    names = [f"word map: {token.strip('▁')}" for token in tokens[:len(word_map)]]
    names += ["mean of the word maps", "sentence map"]
    maps = [*word_map, word_map.mean(0), intermediates["sentence_map"][0].sigmoid()]
    cells = [(f"{name}, {values.min():.2g} to {values.max():.2g}", heatmap(image, values, side))
             for name, values in zip(names, maps)]
    return contact_sheet([(phrase, image), *cells, ("mask", overlay(image, masks[0]))], 4, side)


@torch.inference_mode()
def bench(size, batch_size, device, amp, calls=10):
    """Returns a line: images a second, with a phrase of 10 tokens each, and peak memory on CUDA. Random
    weights; the median of `calls` calls after a warm-up."""
    lora_rank = 0 if size == "tiny" else 16
    model = RSRefSeg(size, lora_rank, dtype=AMP[amp] or torch.float32).eval().to(device)
    images = torch.rand(batch_size, 3, model.image_size, model.image_size, device=device)
    ids = torch.randint(3, 100, (batch_size, 10), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        with autocast(device, amp):
            model(images, ids, mask).sum().item()          # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    text = f"{size}, batch {batch_size}, autocast {amp}, {device}: {batch_size / median:.2f} images/s"
    if device.startswith("cuda"):
        text += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a checkpoint, or measure the speed of a size.")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="a checkpoint of train.py or of the released code")
    add("--bench", choices=list(SIGLIP_SIZE), nargs="?", const="b", help="measure its speed instead")
    add("--data", type=Path, help="data folder, if not the one it was trained on")
    add("--dataset", choices=list(FORMATS), help="format of --data, if the folder does not tell")
    add("--split", default="test", choices=SPLITS, help="default: test")
    add("--shuffle-phrases", action="store_true", help="negative control: other phrases")
    add("--batch-size", type=int, help="default: 8; 1 for --bench")
    add("--workers", type=int, default=0, help="processes that read images (default: 0)")
    add("--siglip", help="SigLIP weights, if they moved: file, folder or Hugging Face name")
    add("--sam-weights", help="SAM weights, if they moved")
    add("--device", default=DEVICE, help=f"default: {DEVICE}")
    add("--amp", choices=list(AMP), default=DEFAULT_AMP, help=f"autocast type (default: {DEFAULT_AMP})")
    args = parser.parse_args(argv)
    if args.bench:
        print(bench(args.bench, args.batch_size or 1, args.device, args.amp))
        return
    if args.checkpoint is None:
        parser.error("name a checkpoint, or give --bench")
    metadata = read_checkpoint(args.checkpoint)[0]
    data = args.data or metadata.get("data")
    if data is None:
        parser.error(f"{args.checkpoint} does not say what it was trained on: give --data")

    dtype = AMP[args.amp] or torch.float32
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights, dtype)
    model.to(args.device)
    if args.data is None and args.dataset is None:
        args.dataset = metadata.get("dataset")
    dataset = RefSegDataset(data, args.split, model.image_size, dataset=args.dataset)
    rows = evaluate(model, dataset, args.batch_size or 8, args.amp, args.workers, args.shuffle_phrases)
    result = scores(rows)
    name = f"shuffled.{args.split}" if args.shuffle_phrases else args.split
    if args.data:
        name = f"{args.data.name}.{name}"
    print(category_table(rows))
    print(format_record(name, result))
    stem = f"{args.checkpoint.with_suffix('')}.{name}"
    report = dict(checkpoint=str(args.checkpoint), data=str(data), split=args.split, amp=args.amp,
                  shuffled=args.shuffle_phrases, metrics=result, samples=rows)
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1))
    with autocast(args.device, args.amp):
        sheet = picture_sheet(model, dataset, rows, best_median_worst(rows))
    sheet.save(f"{stem}.jpg", quality=90)
    print(f"wrote {stem}.json and {stem}.jpg")


if __name__ == "__main__":
    run(main)
