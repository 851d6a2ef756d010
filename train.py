"""Train RSRefSeg. The defaults are the paper's recipe; `train`, at the end, runs it step by step.

    python train.py --sam tiny                     draws its data, needs no download, runs in minutes
    python train.py --sam b [--resume]             downloads the pretrained towers once
    torchrun --nproc-per-node 8 train.py --sam b

Writes into --out: best.safetensors (by gIoU on val) and last.safetensors, which hold what is trained,
resume.pt, log.jsonl, and a picture of five samples per validation. The order of samples follows from
(seed, epoch), dropout from (seed, step, rank): a resumed run ends with the same weights, bit for bit on
a CPU in fp32 with the same number of processes.
"""
import argparse
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import FORMATS, InputError, RefSegDataset, collate, error_context, exit_with_parent
from data import rank_and_world_size, run, toy_tokenizer, write_toy
from evaluate import evaluate, log, metrics, picture_sheet
from lora import trainable_state_dict
from rsrefseg import AMP, DEVICE, SIGLIP_SIZE, RSRefSeg, atomic_write, autocast, cast_frozen_linears
from rsrefseg import default_amp, load_tensors, read_checkpoint
from sam import CONFIGS, read_state

# tiny has no pretrained towers: all is trained, with a second loss that teaches the towers to agree.
TINY = dict(data=Path("data", "toy"), lora_rank=0, epochs=5, batch_size=8, total_batch=8,
            phrases_per_image=4, lr=1e-3, warmup_epochs=0.25, clip=1.0, map_loss=1.0, workers=0)

MAY_CHANGE_ON_RESUME = ("data", "format", "out", "siglip", "sam_weights", "init", "resume", "device",
                        "checkpoint_activations", "workers", "save_every")

def parse_args(argv=None):
    """Returns the arguments. --sam is parsed first: it decides the defaults, the paper's or TINY."""
    size = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    size.add_argument("--sam", choices=list(SIGLIP_SIZE), default="b", help="size")
    parser = argparse.ArgumentParser(description="Train RSRefSeg.", parents=[size], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data", "rrsis-d"), help="folder, see data.py")
    add("--format", choices=list(FORMATS), help="of --data, if the folder does not tell")
    add("--out", type=Path, help="folder for checkpoints and logs; None is runs/SIZE")
    add("--siglip", help="SigLIP weights: file, folder or Hugging Face name; None is the published one")
    add("--sam-weights", help="SAM weights likewise, or one of Meta's .pth files")
    add("--init", type=Path, help="start from this checkpoint, also a released one, with its settings")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--lora-rank", type=int, default=16, help="0 trains the towers whole")
    add("--lora-alpha", type=float, default=16, help="the adapters are scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="on the input of the adapters")
    add("--text-lora", action=argparse.BooleanOptionalAction, default=True, help="adapt the text tower")
    add("--down-blocks", type=int, default=2, choices=[1, 2, 3], help="stride-2 blocks of the prompter")
    add("--prompts", default="both", choices=["both", "sparse", "dense"], help="what SAM receives")
    add("--branches", default="both", choices=["both", "local", "global"], help="of the prompter")
    add("--epochs", type=int, default=200, help="passes over the training split")
    add("--batch-size", type=int, default=4, help="images per forward pass and process")
    add("--total-batch", type=int, default=32, help="images per optimizer step, by accumulation")
    add("--phrases-per-image", type=int, default=1, help="phrases that share an image's encoding")
    add("--lr", type=float, default=1e-4, help="highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on all parameters")
    add("--warmup-epochs", type=float, default=5, help="epochs of linear warm-up")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0 does not clip")
    add("--map-loss", type=float, default=0.0, help="weight of a second loss, on the sentence map")
    add("--device", default=DEVICE, choices=["cuda", "cpu"], help="CUDA_VISIBLE_DEVICES selects a card")
    add("--amp", choices=list(AMP), help="autocast type; None is the fastest of the device")
    add("--checkpoint-activations", action="store_true", help="recompute activations to save memory")
    add("--workers", type=int, default=4, help="processes that read images")
    add("--seed", type=int, default=0, help="of initial weights, order and dropout")
    add("--save-every", type=int, default=100, help="steps between writings of resume.pt")
    add("--val-every", type=int, default=1, help="epochs between validations")
    if size.parse_known_args(argv)[0].sam == "tiny":
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs", args.sam)
    args.amp = args.amp or default_amp(args.device)
    if args.sam == "tiny" and not args.init and (args.siglip or args.sam_weights or args.lora_rank):
        parser.error("tiny is trained from scratch: no --siglip, --sam-weights or --lora-rank")
    for name in ("epochs", "batch_size", "total_batch", "phrases_per_image", "save_every", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args

def learning_rate(step, steps_per_epoch, args):
    """Linear from 0.01 lr to lr over the warm-up, then cosine to 0.001 lr at the end."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:     # full at the last warm-up step; min and max, as warmup may be a fraction
        return args.lr * (0.01 + 0.99 * min(1, step / max(1, warmup - 1)))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.epochs * steps_per_epoch - warmup)))
    return args.lr * (0.001 + 0.999 * cosine)

def fit_batch(args, items, world_size):
    """Returns the steps per epoch. Lowers total_batch to the number of items, if that is smaller."""
    if args.total_batch > items >= world_size:
        args.batch_size = min(args.batch_size, items // world_size)
        args.total_batch = items - items % (args.batch_size * world_size)
        print(f"the train split has {items} items: --total-batch is lowered to {args.total_batch}")
    if args.total_batch > items or args.total_batch % (args.batch_size * world_size):
        raise InputError(f"--total-batch {args.total_batch} must be a multiple of --batch-size "
                         f"{args.batch_size} x {world_size} processes, and at most {items}, all items.")
    return items // args.total_batch

def batches(dataset, args, step, steps_per_epoch):
    """Yields this process's training batches from optimizer step `step` on, without end. Each epoch is
    shuffled anew by (seed, epoch); the items that fill no whole step are left out."""
    rank, world_size = rank_and_world_size()
    if args.sam == "tiny":     # kept in memory, less the full-size masks, which only scoring needs
        dataset = [dict(item, originals=[]) for item in tqdm(dataset, "reading", disable=rank > 0)]
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
        order = torch.randperm(len(dataset), generator=generator)
        order = order[done * args.total_batch:steps_per_epoch * args.total_batch]
        order = order.view(-1, world_size, args.batch_size)        # (micro-batches, processes, images)
        own = order[:, rank].flatten().tolist()                    # the images of this process
        # A separate generator: the loader must not advance the random numbers that dropout uses.
        yield from DataLoader(dataset, args.batch_size, sampler=own, collate_fn=collate,
                              num_workers=args.workers, pin_memory=args.device == "cuda",
                              generator=torch.Generator(), worker_init_fn=exit_with_parent)
        step = (epoch + 1) * steps_per_epoch

def initial_model(args):
    """Returns the model that training starts from."""
    names = ["sam", "lora_rank", "lora_alpha", "lora_dropout", "text_lora", "down_blocks", "prompts",
             "branches"]
    settings = {name: getattr(args, name) for name in names}
    if args.init:
        model = RSRefSeg.from_checkpoint(args.init, args.siglip, args.sam_weights)
        if model.tower_sources:               # else checkpoints will hold the towers, in fp32
            cast_frozen_linears(model, AMP[args.amp])
        if model.settings["sam"] != args.sam:
            raise InputError(f"{args.init} holds size {model.settings['sam']}, not --sam {args.sam}.")
        print(f"settings of {args.init}: {model.settings}")
    elif args.sam == "tiny":
        model = RSRefSeg(**settings)
        model.tokenizer = toy_tokenizer()
    else:
        settings.update(siglip=args.siglip, sam_weights=args.sam_weights, dtype=AMP[args.amp])
        model = RSRefSeg.from_pretrained(**settings)
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    return model

def save_state(args, config, step, best, model, optimizer, scaler):
    """Write resume.pt: steps done, best gIoU, all that training changes, and the run's config."""
    if rank_and_world_size()[0] == 0:
        state = dict(config=config, step=step, best=best, model=trainable_state_dict(model),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        atomic_write(args.out / "resume.pt", lambda file: torch.save(state, file))

def load_state(args, config, model, optimizer, scaler):
    """Load resume.pt, unless it is of another run. Returns the steps done and the best gIoU."""
    path = args.out / "resume.pt"
    with error_context("--resume"):
        state, _ = read_state(path)
        before = state["config"]
    changed = [f"{name} was {before.get(name)}, is {value}" for name, value in config.items()
               if before.get(name) != value]
    if changed:
        raise InputError(f"{path} is of other flags or data: {', '.join(changed)}.")
    load_tensors(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["best"]

# ------------------------------------------------------------------------------------- the training loop
def segmentation_loss(logits, masks):
    """5 x binary cross-entropy, as in the released code (AdamW hardly notices the factor). Logits
    (N, 1, h, w) of any size are enlarged to that of masks (N, 1, H, W) in [0, 1]."""
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear")
    return 5 * F.binary_cross_entropy_with_logits(logits, masks.float())

def training_step(step, model, ddp_model, loader, optimizer, scaler, args):
    """One optimizer step on total_batch images. Returns this process's loss and the gradient norm.
    Raises InputError, before the weights change, if either is not finite (see below for fp16)."""
    accumulate = args.total_batch // (args.batch_size * rank_and_world_size()[1])
    mean_loss = torch.zeros((), device=model.device)
    samples = []
    for i in range(accumulate):
        batch = next(loader)
        samples += [ref.ref_id for ref in batch["refs"]]                   # a ref is a phrase's row
        images = batch["images"].to(model.device, non_blocking=True)       # (B, 3, S, S) uint8
        masks = batch["masks"].to(model.device, non_blocking=True)         # (N, 1, S, S) bool
        ids, token_mask = model.tokenize([ref.phrase for ref in batch["refs"]])
        ddp_model.require_backward_grad_sync = i == accumulate - 1     # only DDP reads it: all-reduce
        with autocast(model.device, args.amp):
            output = ddp_model(images / 255, ids, token_mask)
        loss = segmentation_loss(output.logits, masks)
        if args.map_loss:                      # not in the paper: it teaches untrained towers to agree
            sentence_map = output.sentence_map[:, None]
            coverage = F.adaptive_avg_pool2d(masks.float(), sentence_map.shape[-2:])
            loss = loss + args.map_loss * segmentation_loss(sentence_map, coverage)
        scaler.scale(loss / accumulate).backward()
        mean_loss += loss.detach() / accumulate
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()   # inf: no clip
    loss = mean_loss.item()
    # In fp16, GradScaler skips a step that overflows, and halves its scale. Below 1e-3 give up.
    overflow_allowed = scaler.is_enabled() and scaler.get_scale() > 1e-3
    if not math.isfinite(loss) or (not math.isfinite(norm) and not overflow_allowed):
        raise InputError(f"step {step}: loss {loss}, gradient {norm}, samples {samples}; resume.pt is "
                         "intact. Try a lower --lr, --clip 1, or --init with an earlier checkpoint.")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss, norm

def validate(model, val_set, step, best, args):
    """Score val, write the checkpoints and a picture of five samples. Returns the best gIoU so far."""
    rows = evaluate(model, val_set, args.batch_size, args.amp, args.workers)
    result = metrics(rows)
    log(args.out, "val", step, result)
    if rank_and_world_size()[0] == 0:
        metadata = dict(step=step, val=result, data=str(args.data.absolute()), format=args.format)
        model.save(args.out / "last.safetensors", **metadata)
        if result["gIoU"] > best:
            model.save(args.out / "best.safetensors", **metadata)
        with autocast(model.device, args.amp):
            sheet = picture_sheet(model, val_set, rows, [i * len(rows) // 5 for i in range(5)])
        sheet.save(args.out / f"val_{step:06d}.jpg", quality=85)
    model.train()
    return max(best, result["gIoU"])

def train(args):
    if "LOCAL_RANK" in os.environ and args.device == "cuda":           # torchrun: a GPU per process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(hours=1), device_id=device)
    elif "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world_size = rank_and_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                             # only rank 0 prints
    resumable = (args.out / "resume.pt").exists()
    if args.resume and not resumable:
        raise InputError(f"{args.out} holds no run to resume.")
    if not args.resume and (resumable or (args.out / "best.safetensors").exists()):
        raise InputError(f"{args.out} holds a run: give --resume, or another --out.")
    print(f"{args.device}, autocast {args.amp}, {torch.get_num_threads()} threads per process")
    torch.backends.cuda.enable_cudnn_sdp(False)        # gradients may be NaN: PyTorch's issue 196678

    # Data
    if rank == 0 and args.data == TINY["data"] and not (args.data / "phrases.jsonl").exists():
        write_toy(args.data)
    if world_size > 1:
        dist.barrier()
    side = CONFIGS[args.sam].image_size
    train_set = RefSegDataset(args.data, "train", side, args.phrases_per_image, args.format)
    val_set = RefSegDataset(args.data, "val", side, format=args.format)
    test_set = RefSegDataset(args.data, "test", side, format=args.format)
    print(f"phrases: train {len(train_set.refs):,}, val {len(val_set):,}, test {len(test_set):,}")
    steps_per_epoch = fit_batch(args, len(train_set), world_size)
    total_steps = args.epochs * steps_per_epoch
    print(f"{total_steps} steps of {args.total_batch} images, {steps_per_epoch} per epoch")
    if args.warmup_epochs >= args.epochs:
        print(f"warning: {args.epochs} epochs never leave the warm-up of {args.warmup_epochs:g}")

    # Model and optimizer
    torch.manual_seed(args.seed)
    model = initial_model(args)
    if world_size > 1 and args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(args.device, memory_format=torch.channels_last)           # faster convolutions
    ddp_model = DistributedDataParallel(model) if world_size > 1 else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} parameters are trained")
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    args.out.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE_ON_RESUME}
    config.update(model.settings, towers_saved=not model.tower_sources, training_items=len(train_set))
    first_step = 0
    best = -1.0                                                        # gIoU on val
    if args.resume:
        first_step, best = load_state(args, config, model, optimizer, scaler)
        print(f"resumed after step {first_step} of {total_steps}")
    else:
        save_state(args, config, first_step, best, model, optimizer, scaler)

    # The loop
    loader = batches(train_set, args, first_step, steps_per_epoch)
    losses = []                                                        # since the last record
    start = time.perf_counter()
    model.train()
    for step in tqdm(range(first_step, total_steps), "training", total_steps, initial=first_step,
                     disable=rank > 0):
        torch.manual_seed((args.seed * 1_000_003 + step) * 10_007 + rank)      # of dropout
        lr = learning_rate(step, steps_per_epoch, args)
        optimizer.param_groups[0]["lr"] = lr                           # the only group
        loss, norm = training_step(step, model, ddp_model, loader, optimizer, scaler, args)
        losses.append(loss)
        done = step + 1
        if done % 50 == 0 or done % steps_per_epoch == 0:
            mean_loss = torch.tensor(losses, device=args.device).mean() / world_size
            if world_size > 1:
                dist.all_reduce(mean_loss)                             # a sum
            speed = len(losses) * args.total_batch / (time.perf_counter() - start)
            record = dict(loss=mean_loss.item(), lr=lr, gradient_norm=norm, images_per_second=speed)
            if args.device == "cuda":
                record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            log(args.out, "train", done, record)
            losses = []
        if done == total_steps or done % (args.val_every * steps_per_epoch) == 0:
            if optimizer.state[parameters[0]]["step"] == 0:            # fused AdamW: all were skipped
                raise InputError("no step was made: each gradient overflowed in fp16. Try --amp bf16.")
            best = validate(model, val_set, done, best, args)
            save_state(args, config, done, best, model, optimizer, scaler)
        elif done % args.save_every == 0:
            save_state(args, config, done, best, model, optimizer, scaler)
        if not losses:                                                 # just logged
            start = time.perf_counter()                                # after the validation

    # The final score, with the best checkpoint
    if world_size > 1:
        dist.barrier()                                                 # rank 0 has written it
    path = args.out / "best.safetensors"
    load_tensors(model, read_checkpoint(path)[1], path)
    rows = evaluate(model, test_set, args.batch_size, args.amp, args.workers)
    log(args.out, "test", total_steps, metrics(rows))
    if world_size > 1:
        dist.destroy_process_group()

def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command with --resume continues, if --out has a resume.pt")

if __name__ == "__main__":
    run(main)
