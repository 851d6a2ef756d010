"""Train RSRefSeg. The defaults are the paper's recipe; `main`, at the end, runs it step by step.

    python train.py --sam tiny                     draws its data, needs no download, runs in minutes
    python train.py --sam b                        downloads the pretrained towers once
    python train.py --sam b --resume               continues a run
    torchrun --nproc-per-node 8 train.py --sam b

Writes into --out: best.safetensors (by gIoU on val) and last.safetensors, which hold what is trained,
resume.pt (the state of the run), log.jsonl, and a picture of five samples per validation. Ctrl-C and
SIGTERM save and exit. Random numbers need no state: the order of the samples follows from (seed, epoch),
dropout from (seed, step, rank), so a resumed run ends with the weights of an uninterrupted one.
"""
import argparse
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import lora
from data import FORMATS, RefSegDataset, collate, run, toy_tokenizer, worker_init, write_toy
from evaluate import evaluate, format_record, picture_sheet, rank_and_world_size, scores
from rsrefseg import AMP, DEFAULT_AMP, DEVICE, SIGLIP_SIZE
from rsrefseg import RSRefSeg, atomic_write, autocast, read_checkpoint
from sam import CONFIGS, copy_tensors, read_state

# `--sam tiny` has no pretrained towers: a loss that teaches them to agree, few epochs at a high rate.
TINY = dict(lora_rank=0, epochs=5, batch_size=8, total_batch=8, phrases=4, lr=1e-3, warmup_epochs=0.25,
            clip=1.0, map_loss=1.0, workers=0)

# What may differ when a run is resumed. Data may move: run_config compares the samples, not the path.
MAY_CHANGE = ("data", "dataset", "out", "siglip", "sam_weights", "init", "resume", "device",
              "checkpoint_activations", "workers", "save_every")


def parse_args(argv=None):
    """Returns the arguments. The defaults are the paper's for b and l; TINY has those of tiny."""
    size = argparse.ArgumentParser(add_help=False)             # --sam first: the defaults depend on it
    size.add_argument("--sam", choices=list(SIGLIP_SIZE), default="b", help="size (default: b)")
    sam = size.parse_known_args(argv)[0].sam
    parser = argparse.ArgumentParser(description="Train RSRefSeg.", parents=[size], allow_abbrev=False)

    def add(flag, default, help, **options):
        if sam == "tiny":
            default = TINY.get(flag[2:].replace("-", "_"), default)
        if default is not None:
            help = f"{help} (default: {default})"
        parser.add_argument(flag, default=default, help=help, **options)

    add("--data", Path("data", "toy" if sam == "tiny" else "rrsis-d"), "see data.py", type=Path)
    add("--dataset", None, "format of --data, if the folder does not tell", choices=list(FORMATS))
    add("--out", Path("runs", sam), "folder for checkpoints and logs", type=Path)
    add("--siglip", None, "SigLIP weights, if not the published ones: file, folder or Hugging Face name")
    add("--sam-weights", None, "SAM weights likewise, or one of Meta's .pth files")
    add("--init", None, "start from this checkpoint (also a released one), with its settings", type=Path)
    add("--resume", False, "continue the run in --out", action="store_true")
    add("--lora-rank", 16, "0 trains the towers whole", type=int)
    add("--lora-alpha", 16, "the adapters are scaled by alpha / rank", type=float)
    add("--lora-dropout", 0.1, "dropout on the input of the adapters", type=float)
    add("--text-lora", True, "adapt the text tower too", action=argparse.BooleanOptionalAction)
    add("--down-blocks", 2, "stride-2 convolutions of the prompter", type=int, choices=[1, 2, 3])
    add("--prompts", "both", "which prompts SAM receives", choices=["both", "sparse", "dense"])
    add("--text", "both", "which text features the prompter uses", choices=["both", "local", "global"])
    add("--epochs", 200, "passes over the training split", type=int)
    add("--batch-size", 4, "images per forward pass and process", type=int)
    add("--total-batch", 32, "images per optimizer step, by gradient accumulation", type=int)
    add("--phrases", 1, "phrases of one image that make an item and share its encoding", type=int)
    add("--lr", 1e-4, "highest learning rate", type=float)
    add("--weight-decay", 0.05, "of AdamW, on all parameters", type=float)
    add("--warmup-epochs", 5, "epochs of linear warm-up", type=float)
    add("--clip", 0.0, "largest gradient norm; 0 does not clip", type=float)
    add("--map-loss", 0.0, "weight of a second loss, on the sentence map", type=float)
    add("--device", DEVICE, "CUDA_VISIBLE_DEVICES selects the card", choices=["cuda", "cpu"])
    add("--amp", DEFAULT_AMP, "autocast type", choices=list(AMP))
    add("--checkpoint-activations", False, "recompute activations to save memory", action="store_true")
    add("--workers", 4, "processes that read images", type=int)
    add("--seed", 0, "of initial weights, order and dropout", type=int)
    add("--save-every", 200, "steps between writings of resume.pt", type=int)
    add("--val-every", 1, "epochs between validations", type=int)
    args = parser.parse_args(argv)
    if sam == "tiny" and not args.init and (args.siglip or args.sam_weights or args.lora_rank):
        parser.error("tiny is trained from scratch: no --siglip, --sam-weights or --lora-rank")
    for name in ("epochs", "batch_size", "total_batch", "phrases", "save_every", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def learning_rate(step, steps_per_epoch, args):
    """Linear from 0.01 lr to lr over the warm-up, then cosine to 0.001 lr at the end.

    The released code lowers the rate once per epoch, along a cosine from epoch 5 to 205 that is cut off
    at 200. To imitate it, pass --epochs 205, round `step` down to whole epochs here after the warm-up,
    and stop the run after epoch 200."""
    warmup = args.warmup_epochs * steps_per_epoch
    total = args.epochs * steps_per_epoch
    if step < warmup:                                           # the last warm-up step has the full rate
        return args.lr * (0.01 + 0.99 * min(1, step / max(1, warmup - 1)))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return args.lr * (0.001 + 0.999 * cosine)


# ----------------------------------------------------------------------------------- processes and data

def init_distributed(args):
    """Join the processes that torchrun started, one GPU per process. Returns rank and world size."""
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if args.device == "cuda" else "gloo"
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timedelta(hours=1))     # downloads take long
    return rank_and_world_size()


def load_data(args):
    """Returns the train, val and test sets. Draws the toy set if it is missing."""
    drawn = (args.data / "phrases.jsonl").exists()                     # the file that is written last
    if args.data == Path("data", "toy") and not drawn and rank_and_world_size()[0] == 0:
        write_toy(args.data)
    if dist.is_initialized():
        dist.barrier()
    side = CONFIGS[args.sam].image
    train_set = RefSegDataset(args.data, "train", side, args.phrases, dataset=args.dataset)
    val_set = RefSegDataset(args.data, "val", side, dataset=args.dataset)
    test_set = RefSegDataset(args.data, "test", side, dataset=args.dataset)
    print(train_set, val_set, test_set, sep="\n")
    return train_set, val_set, test_set


def batches(dataset, args, step, steps_per_epoch):
    """Yields this process's training batches from optimizer step `step` on, without end. Each epoch is
    shuffled anew by (seed, epoch); the items that fill no whole step are left out."""
    rank, world_size = rank_and_world_size()
    if args.sam == "tiny":
        dataset = [dict(item, originals=[]) for item in dataset]    # read once; originals: for scoring
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
        order = torch.randperm(len(dataset), generator=generator)
        order = order[done * args.total_batch:steps_per_epoch * args.total_batch]
        # (micro-batches, processes, batch_size): this process takes its column.
        indices = order.view(-1, world_size, args.batch_size)[:, rank].flatten().tolist()
        # A separate generator: the loader must not advance the random numbers that dropout uses.
        yield from DataLoader(dataset, args.batch_size, sampler=indices, collate_fn=collate,
                              num_workers=args.workers, pin_memory=args.device == "cuda",
                              worker_init_fn=worker_init, generator=torch.Generator())
        step = (epoch + 1) * steps_per_epoch


# ----------------------------------------------------------------------------------- model and its state

def initial_model(args):
    """Returns the model that training starts from."""
    dtype = AMP[args.amp] or torch.float32
    names = "sam lora_rank lora_alpha lora_dropout text_lora down_blocks prompts text".split()
    settings = {name: getattr(args, name) for name in names}
    if args.init:
        model = RSRefSeg.from_checkpoint(args.init, args.siglip, args.sam_weights, dtype)
        if model.settings["sam"] != args.sam:
            raise ValueError(f"{args.init} holds size {model.settings['sam']}, not --sam {args.sam}.")
        print(f"settings of {args.init}: {model.settings}")
    elif args.sam == "tiny":
        model = RSRefSeg(**settings)
        model.tokenizer = toy_tokenizer()
    else:
        sources = dict(siglip=args.siglip, sam_weights=args.sam_weights)
        model = RSRefSeg.from_pretrained(**sources, **settings, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    return model


def run_config(args, model, refs):
    """Returns what a resumed run must share with its first part: recipe, data and frozen weights."""
    config = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    config.update(model.settings, backbones=bool(model.backbones))    # decides what checkpoints hold
    rows = [(ref.ref_id, ref.image.name, ref.phrase) for ref in refs]
    # One number of each frozen tensor is enough to tell other weights.
    frozen = [p.flatten()[-1].item() for p in model.parameters() if not p.requires_grad]
    config["training_rows"] = hashlib.sha1(json.dumps(rows).encode()).hexdigest()
    config["frozen_weights"] = hashlib.sha1(json.dumps(frozen).encode()).hexdigest()
    return config


def save_state(args, config, progress, model, optimizer, scaler):
    """Write resume.pt: all that a run changes, and its config."""
    if rank_and_world_size()[0] == 0:
        state = dict(config=config, progress=progress, model=lora.trainable_state_dict(model),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        buffer = io.BytesIO()
        torch.save(state, buffer)
        atomic_write(args.out / "resume.pt", buffer.getvalue())


def load_state(args, config, model, optimizer, scaler):
    """Load resume.pt and return its progress. Raises ValueError if it is corrupt or of another run."""
    path = args.out / "resume.pt"
    state = read_state(path)
    changed = [f"{name} {state['config'][name]} -> {config[name]}" for name in config
               if state["config"][name] != config[name]]
    if changed:
        raise ValueError(f"{path} belongs to other arguments or data: {', '.join(changed)}.")
    copy_tensors(state["model"], lora.trainable_state_dict(model), path)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["progress"]


# ------------------------------------------------------------------------------------- steps of the loop

def segmentation_loss(logits, masks):
    """5 x binary cross-entropy, as in the released code, at the size of masks (N, 1, H, W) in [0, 1]."""
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear")
    return 5 * F.binary_cross_entropy_with_logits(logits, masks.float())


def training_step(step, model, ddp_model, loader, optimizer, scaler, args):
    """One optimizer step on total_batch images. Returns this process's loss and the gradient norm.
    Raises ValueError, before the weights change, if either is not finite."""
    accumulate = args.total_batch // (args.batch_size * rank_and_world_size()[1])
    mean_loss = torch.zeros((), device=model.device)
    samples = []
    for i in range(accumulate):
        batch = next(loader)
        samples += [ref.ref_id for ref in batch["refs"]]
        images = batch["images"].to(model.device, non_blocking=True)
        masks = batch["masks"].to(model.device, non_blocking=True)
        ids, token_mask = model.tokenize([ref.phrase for ref in batch["refs"]])
        intermediates = {}                       # forward fills it; DistributedDataParallel passes it on
        last = i == accumulate - 1
        # Several processes all-reduce their gradients only with the last micro-batch.
        with nullcontext() if last or ddp_model is model else ddp_model.no_sync():
            with autocast(model.device, args.amp):
                logits = ddp_model(images / 255, ids, token_mask, intermediates)
            loss = segmentation_loss(logits, masks)
            if args.map_loss:                  # not in the paper: it teaches untrained towers to agree
                sentence_map = intermediates["sentence_map"][:, None]
                coverage = F.adaptive_avg_pool2d(masks.float(), sentence_map.shape[-2:])
                loss = loss + args.map_loss * segmentation_loss(sentence_map, coverage)
            scaler.scale(loss / accumulate).backward()
        mean_loss += loss.detach() / accumulate
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()   # inf: no clip
    loss = mean_loss.item()
    # With fp16, GradScaler skips a step whose gradients overflow: then only the loss counts.
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise ValueError(f"step {step}: loss {loss}, gradient {norm}, samples {samples}; resume.pt is "
                         "intact. Try a lower --lr, --clip 1, or --init with an earlier checkpoint.")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss, norm


def log(args, kind, step, record):
    """Print a record and append it to log.jsonl. After a crash steps may repeat: the last counts."""
    if rank_and_world_size()[0] == 0:
        with tqdm.external_write_mode():               # moves the progress bar out of the way
            print(format_record(f"{kind} step {step}", record), flush=True)
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(kind=kind, step=step, **record)) + "\n")


def validate(model, val_set, step, best, args):
    """Score val, write the checkpoints and a picture of five samples. Returns the best gIoU so far."""
    rows = evaluate(model, val_set, args.batch_size, args.amp, args.workers)
    result = scores(rows)
    log(args, "val", step, result)
    if rank_and_world_size()[0] == 0:
        metadata = dict(step=step, val=result, data=str(args.data.absolute()), dataset=args.dataset)
        model.save(args.out / "last.safetensors", **metadata)
        if result["gIoU"] > best:
            model.save(args.out / "best.safetensors", **metadata)
        with autocast(model.device, args.amp):
            sheet = picture_sheet(model, val_set, rows, [i * len(rows) // 5 for i in range(5)])
        sheet.save(args.out / f"val_{step:06d}.jpg", quality=85)
    model.train()
    return max(best, result["gIoU"])


def main(argv=None):
    args = parse_args(argv)
    rank, world_size = init_distributed(args)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                             # only rank 0 prints
    resumable = (args.out / "resume.pt").exists()
    if args.resume and not resumable:
        raise ValueError(f"{args.out} holds no run to resume.")
    if not args.resume and (resumable or (args.out / "best.safetensors").exists()):
        raise ValueError(f"{args.out} holds a run: give --resume, or another --out.")

    # Data
    train_set, val_set, test_set = load_data(args)
    steps_per_epoch = len(train_set) // args.total_batch
    total_steps = args.epochs * steps_per_epoch
    if args.total_batch % (args.batch_size * world_size) or steps_per_epoch == 0:
        raise ValueError(f"--total-batch must be at most {len(train_set)}, the size of the train split, "
                         f"and a multiple of --batch-size x {world_size} processes.")
    print(f"{total_steps} steps of {args.total_batch} images, {steps_per_epoch} per epoch")

    # Model and optimizer
    torch.manual_seed(args.seed)
    model = initial_model(args)
    if world_size > 1 and args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(args.device, memory_format=torch.channels_last)           # faster convolutions
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    print(lora.parameter_table(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")

    # Resume
    args.out.mkdir(parents=True, exist_ok=True)
    config = run_config(args, model, train_set.refs)
    progress = dict(step=0, validated=0, best=-1.0)        # steps done, last validated step, best gIoU
    if args.resume:
        progress = load_state(args, config, model, optimizer, scaler)
        print(f"resumed at step {progress['step']}")
    received = []                                          # signals
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))

    # The loop
    loader = batches(train_set, args, progress["step"], steps_per_epoch)
    bar = tqdm(total=total_steps, initial=progress["step"], desc="training", disable=rank > 0)
    model.train()
    while True:
        step = progress["step"]
        stop = torch.tensor(len(received), device=args.device)
        if world_size > 1:
            dist.all_reduce(stop)                                     # a signal to one process stops all
        if stop:
            save_state(args, config, progress, model, optimizer, scaler)
            print(f"stopped after step {step} of {total_steps}: continue with --resume", flush=True)
            sys.exit(128 + signal.SIGTERM)                            # also for Ctrl-C
        due = step % (args.val_every * steps_per_epoch) == 0 or step == total_steps
        if due and step > progress["validated"]:
            progress["best"] = validate(model, val_set, step, progress["best"], args)
            progress["validated"] = step
            save_state(args, config, progress, model, optimizer, scaler)
            continue                                                  # a signal may have come meanwhile
        if step == total_steps:
            break

        torch.manual_seed((args.seed * 1_000_003 + step) * 10_007 + rank)      # of dropout
        lr = learning_rate(step, steps_per_epoch, args)
        optimizer.param_groups[0]["lr"] = lr                          # the only group
        start = time.perf_counter()
        loss, norm = training_step(step, model, ddp_model, loader, optimizer, scaler, args)
        speed = args.total_batch / (time.perf_counter() - start)
        progress["step"] = step + 1
        bar.update()
        if (step + 1) % 50 == 0 or (step + 1) % steps_per_epoch == 0:
            record = dict(loss=loss, lr=lr, gradient_norm=norm, images_per_second=speed)
            log(args, "train", step + 1, record)
        if (step + 1) % args.save_every == 0 or (step + 1) % steps_per_epoch == 0:
            save_state(args, config, progress, model, optimizer, scaler)
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # The final score, with the best checkpoint
    if dist.is_initialized():
        dist.barrier()                                                # rank 0 has written it
    best = args.out / "best.safetensors"
    copy_tensors(read_checkpoint(best)[1], model.checkpoint_state_dict(), best)
    result = scores(evaluate(model, test_set, args.batch_size, args.amp, args.workers))
    log(args, "test", step, result)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
