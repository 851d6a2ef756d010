"""Train RSRefSeg. Read `main` at the end first: arguments, data, model and optimiser, resume, loop, final score.

    python train.py --sam tiny                     draws its data, needs no download, minutes on two CPU cores
    python train.py --sam b                        the paper's recipe; fetches the pretrained towers once
    python train.py --sam b --resume
    torchrun --nproc-per-node 8 train.py --sam b

Writes into --out: last.safetensors and best.safetensors (by val gIoU; only what trains, settings in the metadata),
resume.pt (all that a run consists of), log.jsonl, at each validation a sheet of the same samples, and curves.png if
matplotlib is installed. Ctrl-C and SIGTERM end after the step, saved; whatever ends a run, --resume goes on from its
last resume.pt as if nothing had happened: on a CPU in fp32 to the last bit.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import lora
from data import FORMATS, RefSegDataset, collate, fatal_defects, leave_group, positive, run, write_toy
from evaluate import AMP, default_amp, evaluate, line, picture_sheet, processes, scores
from rsrefseg import ABLATIONS, SIGLIP_HUB, SIZES, RSRefSeg, is_checkpoint, usable_device, whole_file
from sam import SIZES as SAM_SIZES
from siglip import unknown_words

# What `--sam tiny` does otherwise: no pretrained tower, so losses that teach them to agree, and a few epochs of a high rate.
TINY = dict(epochs=5, batch_size=8, total_batch=8, phrases=4, lr=2e-3, warmup_epochs=0.25, clip=1.0, loss="bce+dice",
            map_loss=1.0, workers=0, cache=True, val_every=1)


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def amount(text):
    """argparse type: a number from 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return float(text)


def parse_args(argv=None):
    tiny = " ".join(flag_of(name) + f" {value}" * (value is not True) for name, value in TINY.items())
    parser = argparse.ArgumentParser(description="Train RSRefSeg.", allow_abbrev=False,
                                     epilog=f"Defaults are the paper's (b, l). --sam tiny has its own: {tiny}",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sam", choices=list(SIZES), required=True, help="size of the model")
    # files
    add("--data", type=Path, help="folder of RRSIS-D, RefSegRS, RISBench or your own (see data.py); unset data/rrsis-d, for tiny "
        "data/toy-SEED, drawn when missing")
    add("--dataset", choices=list(FORMATS), help="format of --data, if the folder does not tell")
    add("--skip-bad", action="store_true", help="train without the rows of train that cannot be used; val and test must be whole")
    add("--clean-masks", action="store_true", help="train on masks without noise around their edges; scores use the stored ones")
    add("--out", type=Path, help="folder for checkpoints and logs; unset runs/SAM")
    add("--siglip", help=f"SigLIP weights: file, folder or hub name; unset {SIGLIP_HUB}, or those of --init")
    add("--sam-weights", help="SAM weights: file, folder, hub name or Meta's .pth; unset by size, or those of --init")
    add("--init", type=Path, help="start from this checkpoint: one of train.py, or one of the released code")
    add("--resume", action="store_true", help="continue the run in --out")
    # model
    add("--lora-rank", type=int, help="0 trains the whole towers; unset by size (16, tiny 0)")
    add("--lora-alpha", type=amount, default=16, help="adapters are scaled by this over the rank")
    add("--lora-dropout", type=amount, default=0.1, help="dropout on the input of the adapters")
    add("--text-lora", action=argparse.BooleanOptionalAction, default=True, help="adapt the text tower too")
    add("--down-blocks", type=int, choices=[1, 2, 3], default=2, help="stride-2 convolutions of the prompter: 14 x 14, 7 x 7 or "
        "4 x 4 sparse prompts (b, l)")
    add("--prompts", choices=ABLATIONS["prompts"], default="both", help="which prompts SAM gets; dense alone needs no prompter")
    add("--text", choices=ABLATIONS["text"], default="both", help="text semantics in the attended features: words, sentence")
    # recipe
    add("--epochs", type=positive, default=200, help="passes over the training split")
    add("--batch-size", type=positive, default=4, help="images in memory at a time, on each of several GPUs")
    add("--total-batch", type=positive, default=32, help="images per optimiser step; gradients accumulate up to it")
    add("--phrases", type=positive, default=1, help="phrases per image, for data with several: they share one encoding")
    add("--lr", type=amount, default=1e-4, help="highest learning rate")
    add("--weight-decay", type=amount, default=0.05, help="of AdamW, on everything that trains")
    add("--warmup-epochs", type=amount, default=5, help="epochs of linear warm-up")
    add("--clip", type=amount, default=0.0, help="largest gradient norm; 0 does not clip")
    add("--loss", choices=["bce", "bce+dice"], default="bce", help="the paper's cross-entropy, or a Dice loss beside it")
    add("--map-loss", type=amount, default=0.0, help="weight of the same loss on the sentence map")
    # machine
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"         # each process its own card: none takes memory on the first
    add("--device", type=usable_device, default=own_gpu if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=list(AMP), help="autocast type; unset bf16 on CUDA, fp16 on its old cards, off elsewhere")
    add("--deterministic", action="store_true", help="the same bits again on the same GPU; what cannot be is named in a warning")
    add("--checkpoint-activations", action="store_true", help="half the memory, half as much time again")
    add("--workers", type=int, default=4, help="processes that read images")
    add("--cache", action=argparse.BooleanOptionalAction, default=False, help="keep training data in memory; with --workers 0")
    add("--seed", type=int, default=0, help="of initial weights and order")
    add("--toy-seed", type=int, default=0, help="seed of the toy scenes, when they have to be drawn")
    add("--log-every", type=positive, default=50, help="optimiser steps between log lines; at least one an epoch")
    add("--save-every", type=positive, default=200, help="optimiser steps between writings of resume.pt")
    add("--val-every", type=positive, default=1, help="epochs between validations, each of which writes a checkpoint")
    size = parser.parse_known_args(argv)[0].sam
    parser.set_defaults(lora_rank=SIZES[size].lora_rank, **TINY if size == "tiny" else {})
    args = parser.parse_args(argv)
    args.draw = args.sam == "tiny" and args.data is None
    args.data = args.data or Path("data") / (f"toy-{args.toy_seed}" if args.draw else "rrsis-d")
    args.out = args.out or Path("runs") / args.sam
    args.amp = args.amp or default_amp(args.device)
    if args.device.startswith("mps"):
        parser.error("--device mps: training there was never run, and its gradients with dropout are known to fail; give cpu")
    if args.sam == "tiny" and args.lora_rank and not (args.siglip and args.sam_weights or args.init):
        parser.error("--sam tiny has no pretrained towers for --lora-rank to adapt, unless --siglip and --sam-weights name some")
    if args.sam == "tiny" and not args.lora_rank and (args.siglip or args.sam_weights):
        parser.error("--sam tiny trains its towers from scratch: --siglip and --sam-weights need a --lora-rank to adapt them")
    if args.lora_rank < 0:
        parser.error(f"--lora-rank {args.lora_rank}: give 0, which trains the whole towers, or more")
    if args.prompts == "sparse" and args.text == "local" and args.map_loss:
        parser.error("--prompts sparse --text local does not use the sentence: give --map-loss 0")
    if not args.text_lora and not args.lora_rank:
        parser.error("--no-text-lora says which towers LoRA adapts: give a --lora-rank above 0")
    return args


def learning_rate(step, steps_per_epoch, args):
    """Linear from 0.01 x over the warm-up, whose last step has the whole rate, then cosine to 0.001 x at the end; step
    counts optimiser steps from 0. The released code takes the cosine in stairs of an epoch, and as if the run were longer
    by the warm-up: after the warm-up `step // steps_per_epoch * steps_per_epoch` for step, and --epochs 205, are theirs."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (0.01 + 0.99 * min(1, step / max(1, warmup - 1)))
    return args.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))


SKIPS = 20   # as many steps in a row without a finite gradient end the run

GROUPS = {"prompter.": "prompter", "sam.prompt_encoder.": "mask prompt", "sam.mask_decoder.": "mask decoder", "": "towers"}


def optimiser_groups(model, args):
    """Named AdamW groups of everything that trains. Weight decay acts on all, norms and biases too, as in the released code."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next(group for prefix, group in GROUPS.items() if name.startswith(prefix))
            groups.setdefault("lora" if name.endswith((".A.weight", ".B.weight")) else group, []).append(parameter)
    for name, parameters in groups.items():
        print(f"optimiser group {name}: {len(parameters)} tensors, {sum(p.numel() for p in parameters):,} parameters")
    return [dict(params=parameters, name=name, weight_decay=args.weight_decay) for name, parameters in groups.items()]


@contextmanager
def noted_signals():
    """-> a list of the signals, SIGINT and SIGTERM, that came; the second of a kind ends the process at once (under torchrun,
    which passes on what already came, it does not: torchrun kills after 30 s)."""
    came = []

    def note(number, frame):
        came.append(signal.Signals(number))
        if not dist.is_initialized():
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_processes(args):
    """Join the processes that torchrun started, if it did -> the number of this one, and how many there are."""
    if "WORLD_SIZE" in os.environ:
        cuda = args.device.startswith("cuda")
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))     # drawing, downloading take long
    return processes()


def batches(dataset, args, step, steps_per_epoch):
    """This process's training batches from optimiser step `step` on, without end. The order is drawn anew each epoch from
    (seed, epoch) alone and dealt out batch by batch, so a resumed run sees what an uninterrupted one would, on any number
    of processes; the items over that fill no whole step are left out."""
    rank, world = processes()
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed * 100_003 + epoch))
        order = order[done * args.total_batch:steps_per_epoch * args.total_batch]
        mine = order.view(-1, world, args.batch_size)[:, rank].flatten().tolist()
        yield from DataLoader(dataset, args.batch_size, sampler=mine, collate_fn=collate, num_workers=args.workers,
                              pin_memory=args.device.startswith("cuda"), worker_init_fn=leave_group,
                              generator=torch.Generator())           # of its own: the model's dropout must not notice the loader
        step = (epoch + 1) * steps_per_epoch


def mean_of_processes(number, device):
    """The mean of a number over all processes, the same to the bit on each."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, dtype=torch.float32, device=device)
    dist.all_reduce(shared)
    return shared.item() / dist.get_world_size()


def log(args, text, **record):
    with tqdm.external_write_mode():                                                   # the progress bar steps aside
        print(text, flush=True)
    if processes()[0] == 0:
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def trim_log(path, step, validated):
    """Drop from log.jsonl what was written after the state that is resumed, and a line that was cut."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if record["kind"] != "test" and record["step"] <= (validated if record["kind"] == "val" else step):
            kept.append(text + "\n")
    with whole_file(path) as partial:
        partial.write_text("".join(kept))


def recipe(args, refs):
    """What must not change under a run that is resumed: arguments, and the rows it is trained on."""
    free = ("resume", "out", "device", "workers", "cache", "log_every", "save_every", "draw", "checkpoint_activations",
            "deterministic")
    rows = hashlib.sha1(repr([(ref.ref_id, ref.image.name, ref.phrase) for ref in refs]).encode(errors="replace")).hexdigest()
    return {flag_of(name): str(value) for name, value in vars(args).items() if name not in free} | {"rows of train": rows}


def draw_samples(model, val_set, rows, step, folder):
    """A sheet of five validation samples, the same each time: one watches the masks emerge. And curves."""
    try:
        sheet = picture_sheet(model, val_set, rows, {f"step {step}": [i * len(rows) // 5 for i in range(5)]})
        sheet.save(folder / f"val_{step:06d}.jpg", quality=85)
        draw_curves(folder)
    except Exception as error:                                                         # no reason to end a run
        tqdm.write(f"pictures of step {step} could not be drawn: {error!r}")


def draw_curves(folder):
    """log.jsonl as curves.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (kind, names) in zip(figure.subplots(1, 3), (("train", ["loss"]), ("train", ["lr"]), ("val", ["gIoU", "cIoU"]))):
        for name in names:
            known = [row for row in rows if row["kind"] == kind and row[name] is not None]
            axis.plot([row["step"] for row in known], [row[name] for row in known], label=f"{kind} {name}")
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=110)


def dropped_rows(defects, args):
    """Defects that data.fatal_defects found -> the ref_ids that --skip-bad leaves out of train. Raises ValueError without it,
    and for a defect in val or test."""
    rows = {(defect["split"], defect["ref_id"]): defect["what"] for defect in defects}
    elsewhere = [row for row in rows if row[0] != "train"]
    if elsewhere or (rows and not args.skip_bad):
        split, ref_id = (elsewhere or list(rows))[0]
        cure = ", or --skip-bad trains without them" if not elsewhere else ": val and test are never scored without some rows"
        raise ValueError(f"{args.data}: {len(rows)} rows cannot be used, {len(elsewhere)} of them in val or test, first ref_id "
                         f"{ref_id} of {split}: {rows[split, ref_id]} `python data.py check {args.data}` lists all. Repair "
                         f"them{cure}.")
    if rows:
        print(f"--skip-bad: {len(rows)} rows of train are left out, as `python data.py check {args.data}` lists them")
    return {ref_id for _, ref_id in rows}


def initial_model(args):
    """The model that training starts from. Raises FileNotFoundError or ValueError naming the file that does not fit."""
    dtype = AMP[args.amp] or torch.float32
    settings = {name: getattr(args, name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "down_blocks", *ABLATIONS)}
    if not args.init:
        if args.sam == "tiny" and not args.lora_rank:
            return RSRefSeg(args.sam, **settings)
        return RSRefSeg.from_pretrained(args.sam, args.siglip or SIGLIP_HUB, args.sam_weights, dtype=dtype, **settings)
    if is_checkpoint(args.init):
        model = RSRefSeg.from_checkpoint(args.init, args.siglip, args.sam_weights, dtype)
    else:
        model = RSRefSeg.load_official(args.init, args.siglip or SIGLIP_HUB, dtype=dtype, lora_alpha=args.lora_alpha,
                                       lora_dropout=args.lora_dropout)
    other = [f"{flag_of(name)} {model.settings[name]}" for name, value in dict(settings, sam=args.sam).items()
             if model.settings[name] != value]
    if other:
        other = " ".join(other).replace("--text-lora False", "--no-text-lora").replace("--text-lora True", "--text-lora")
        raise ValueError(f"{args.init} was trained otherwise: give {other} here too, or choose another --init.")
    return model


def load_resume(path, wanted):
    """resume.pt -> its state. Raises ValueError if it is broken or belongs to another recipe."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole resume file ({error}). Start anew with another --out.") from error
    if not isinstance(state, dict) or "recipe" not in state:
        raise ValueError(f"{path} is no resume file of this train.py. Start anew with another --out.")
    changed = [f"{name} {state['recipe'].get(name)} -> {value}"
               for name, value in wanted.items() if state["recipe"].get(name, "None") != value]
    if changed:
        raise ValueError(f"{path} belongs to another recipe: {', '.join(changed)}. Resume with the run's own arguments.")
    return state


@dataclass
class Progress:
    """Where a run is: all of its state that is neither a weight nor the optimiser's."""
    step: int = 0            # optimiser steps done
    validated: int = 0       # the step of the last validation
    best: float = -1.0       # the highest val gIoU
    running: float = 0.0     # sum of the losses since the last log line ...
    logged: int = 0          # ... and how many they are
    unusable: int = 0        # steps in a row without a finite gradient
    skipped: int = 0         # such steps in all


def check_out(args):
    """Raises ValueError if --out holds a run that would be overwritten, or none that could be resumed."""
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file: name a folder.")
    held = [name for name in ("resume.pt", "last.safetensors", "best.safetensors") if (args.out / name).exists()]
    if args.resume and "resume.pt" not in held:
        cure = "name another --out" if held else "start without --resume"
        raise ValueError(f"{args.out} holds no run to resume, no resume.pt: {cure}.")
    if held and not args.resume:
        resume = "continue it with --resume, or " * ("resume.pt" in held)
        raise ValueError(f"{args.out} already holds a run ({', '.join(held)}): {resume}name another folder with --out.")


def load_data(args):
    """-> the train, val and test sets, checked. Raises ValueError naming a row that cannot be used."""
    rank, world = processes()
    if args.draw and rank == 0 and not (args.data / "rrsisd" / "refs(unc).p").exists():
        write_toy(args.data, seed=args.toy_seed)
    defects = [fatal_defects(args.data, args.dataset) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(defects)                                            # the others wait for the first one's check
    side = SAM_SIZES[SIZES[args.sam].sam].image
    train_set = RefSegDataset(args.data, "train", side, args.phrases, args.cache, args.dataset, args.clean_masks,
                              dropped_rows(defects[0], args))
    sets = train_set, *(RefSegDataset(args.data, split, side, dataset=args.dataset) for split in ("val", "test"))
    print(*sets, sep="\n")
    if len(train_set) < args.total_batch:
        raise ValueError(f"--total-batch {args.total_batch} exceeds the {len(train_set)} training items in {args.data}: "
                         "lower it.")
    return sets


def training_step(model, wrapped, stream, optimiser, scaler, accumulate, args):
    """One optimiser step on the gradients of `accumulate` micro batches -> loss, norm of the gradient, ref_ids of its samples.
    A gradient that is not finite leaves the weights, and BatchNorm's statistics, as they were. `wrapped` is the model, or
    what DistributedDataParallel made of it."""
    device, amp, dice = model.sam.mean.device, AMP[args.amp], args.loss == "bce+dice"
    samples, mean_loss, buffers = [], torch.zeros((), device=device), [buffer.clone() for buffer in model.buffers()]
    for micro in range(accumulate):
        batch, taps = next(stream), {}
        samples += [ref.ref_id for ref in batch["refs"]]
        images, masks = (batch[key].to(device, non_blocking=True) for key in ("images", "masks"))
        ids, mask = model.read_phrases([ref.phrase for ref in batch["refs"]])
        last = micro == accumulate - 1                                                 # gradients travel once a step
        with nullcontext() if wrapped is model or last else wrapped.no_sync():
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = wrapped(images / 255, ids, mask, taps)
            loss = model.loss(logits, masks, dice)
            if args.map_loss:
                loss = loss + args.map_loss * model.map_loss(taps["sentence_map"], masks, dice)
            scaler.scale(loss / accumulate).backward()
        mean_loss += loss.detach() / accumulate
    scaler.unscale_(optimiser)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip or math.inf).item()          # waits for the device: what is not
    if math.isfinite(norm):                                                            # finite must not reach the weights
        scaler.step(optimiser)
    else:
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return mean_loss.item(), norm, samples


def validate(model, val_set, progress, steps_per_epoch, args):
    """Score val, write last.safetensors and, if it is the best so far, best.safetensors -> the rows that evaluate makes."""
    began = time.time()
    for buffer in model.buffers() if dist.is_initialized() else ():                    # where BatchNorm is not synchronised
        dist.broadcast(buffer, 0)                                                      # the first process's statistics count
    rows = evaluate(model, val_set, args.batch_size, AMP[args.amp], args.workers)
    result = scores(rows)
    better, progress.best, progress.validated = result["gIoU"] > progress.best, max(progress.best, result["gIoU"]), progress.step
    about = dict(args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, step=progress.step, val=result)
    for name in ["last.safetensors"] + ["best.safetensors"] * better if processes()[0] == 0 else ():
        model.save(args.out / name, **about)
    text = line(f"val   e {progress.step / steps_per_epoch:06.2f} step {progress.step:06d}", result)
    text += f" | {time.time() - began:.0f} s" + f" | best -> {args.out / 'best.safetensors'}" * better
    log(args, text, kind="val", step=progress.step, **result)
    return rows


def note_skipped(progress, samples, loss, scale, args):
    """Log a step without a finite gradient. Raises ValueError when SKIPS of them came in a row."""
    progress.unusable, progress.skipped = progress.unusable + 1, progress.skipped + 1
    if dist.is_initialized():
        dist.all_gather_object(samples_of := [None] * dist.get_world_size(), samples)
        samples = sum(samples_of, [])
    log(args, f"skip  step {progress.step:06d} | loss {loss}, gradient not finite, weights unchanged | samples {samples}",
        kind="skip", step=progress.step, samples=samples, scale=scale)
    if progress.unusable == SKIPS:
        raise ValueError(f"{SKIPS} steps in a row, to step {progress.step}, had no finite gradient, the last with samples "
                         f"{samples}. They left the weights as they were. Begin a new --out with a lower --lr, with --clip or "
                         f"--amp off; --init {args.out / 'last.safetensors'} starts it from the last validation.")


def log_training(progress, total, steps_per_epoch, rate, norm, took, args):
    """One line on the mean loss since the last one; `took` seconds a step."""
    mean = progress.running / progress.logged if progress.logged else math.nan
    cuda = args.device.startswith("cuda")
    gib = torch.cuda.max_memory_allocated(args.device) / 2**30 if cuda else math.nan
    record = dict(step=progress.step, epoch=progress.step / steps_per_epoch, loss=mean, lr=rate, gnorm=norm,
                  seconds_per_step=took, images_per_second=args.total_batch / took, skipped=progress.skipped, gib=gib)
    text = (f"train e {record['epoch']:06.2f} step {progress.step:06d}/{total:06d} | loss {mean:.4f} | lr {rate:.2e} | "
            f"gnorm {norm:.2f} | {took:.2f} s/it | {record['images_per_second']:.1f} img/s")
    text += f" | {progress.skipped} skipped" * bool(progress.skipped) + f" | {gib:.1f} GiB" * cuda
    finite = {key: value if math.isfinite(value) else None for key, value in record.items()}     # JSON has no NaN
    log(args, text, kind="train", **finite)
    progress.running, progress.logged = 0.0, 0


def main(argv=None):
    args = parse_args(argv)
    rank, world = start_processes(args)
    if rank:
        sys.stdout = open(os.devnull, "w")                                             # the first process speaks for all
    device, amp = torch.device(args.device), AMP[args.amp]
    accumulate, rest = divmod(args.total_batch, args.batch_size * world)
    if rest:
        raise ValueError(f"--total-batch {args.total_batch} is no multiple of --batch-size {args.batch_size}" +
                         f" x {world} processes" * (world > 1))
    check_out(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                    # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)

    # ------------------------------------------------------------------------------------------------ data
    train_set, val_set, test_set = load_data(args)
    steps_per_epoch, left_over = divmod(len(train_set), args.total_batch)
    total = args.epochs * steps_per_epoch
    print(f"{steps_per_epoch} steps of {args.total_batch} images x {args.phrases} phrases an epoch ({world} processes x "
          f"{accumulate} x {args.batch_size} images" + f"; {left_over} items, others each time, are left over" * bool(left_over) +
          f"), {total} steps in all, autocast {args.amp}, {device}")

    # ------------------------------------------------------------------------------------------------ model and optimiser
    torch.manual_seed(args.seed)
    model = initial_model(args)
    if unknown := unknown_words(model.tokenizer, [ref.phrase for ref in train_set.refs]):
        print(f"{args.sam} does not know {len(unknown)} of the words: {', '.join(unknown[:10])}{' ...' * (len(unknown) > 10)}")
    if args.checkpoint_activations:
        model.checkpoint_activations()
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)                                # convolutions run faster in this layout
    print(lora.table(model))
    optimiser = torch.optim.AdamW(optimiser_groups(model, args), lr=args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    args.out.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------ resume
    progress, run_recipe = Progress(), recipe(args, train_set.refs)
    if args.resume:
        state = load_resume(args.out / "resume.pt", run_recipe)
        model.copy_trained(state["model"], state["settings"], args.out / "resume.pt")
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        print(f"resumed {args.out} at step {progress.step}, best val gIoU {progress.best:.2f}")
    if rank == 0:
        trim_log(args.out / "log.jsonl", progress.step, progress.validated)

    def keep():
        """All that a run consists of. Random numbers need no state: order and dropout follow from (seed, step, process)."""
        if rank == 0:
            with whole_file(args.out / "resume.pt") as partial:
                torch.save(dict(progress=vars(progress), model=lora.trained_state_dict(model), settings=model.settings,
                                optimiser=optimiser.state_dict(), scaler=scaler.state_dict(), recipe=run_recipe), partial)

    # ------------------------------------------------------------------------------------------------ loop
    stream, started, since = batches(train_set, args, progress.step, steps_per_epoch), time.time(), progress.step
    validation_due = lambda: progress.step >= total or progress.step % (args.val_every * steps_per_epoch) == 0
    model.train()
    with noted_signals() as signals, tqdm(total=total, initial=progress.step, unit="img", unit_scale=args.total_batch,
                                          desc=f"training {args.sam}", disable=rank > 0) as bar:
        while True:
            if stopped := bool(mean_of_processes(float(bool(signals)), device)):       # one was told to stop: all do
                keep()
                starter = "python" if world == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
                command = shlex.join(["train.py", *(sys.argv[1:] if argv is None else argv), *["--resume"] * (not args.resume)])
                tqdm.write(f"{signals[0].name if signals else 'stopped'} after step {progress.step} of {total}: saved. Go on "
                           f"with\n    {starter} {command}")
                break
            if progress.validated < progress.step and validation_due():
                began = time.time()
                rows = validate(model, val_set, progress, steps_per_epoch, args)
                keep()
                if rank == 0:
                    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                        draw_samples(model, val_set, rows, progress.step, args.out)
                model.train()
                started += time.time() - began
                continue                                                               # to see whether a signal came
            if progress.step >= total:
                break

            torch.manual_seed((args.seed * 1_000_003 + progress.step) * 10_007 + rank)  # of dropout
            rate = learning_rate(progress.step, steps_per_epoch, args)
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss, norm, samples = training_step(model, wrapped, stream, optimiser, scaler, accumulate, args)
            loss = mean_of_processes(loss, device)
            progress.step += 1
            bar.update()
            if math.isfinite(norm):
                progress.running, progress.logged, progress.unusable = progress.running + loss, progress.logged + 1, 0
            else:
                note_skipped(progress, samples, loss, scaler.get_scale(), args)
            if progress.step % min(args.log_every, steps_per_epoch) == 0 or progress.step == total:
                bar.set_postfix(loss=loss)
                took = (time.time() - started) / (progress.step - since)
                log_training(progress, total, steps_per_epoch, rate, norm, took, args)
                started, since = time.time(), progress.step
            if progress.step % args.save_every == 0 or validation_due():
                keep()

    # ------------------------------------------------------------------------------------------------ the final score, once
    if not stopped:
        model.load_trained(args.out / "best.safetensors")
        result = scores(evaluate(model, test_set, args.batch_size, amp, args.workers))
        log(args, line("test ", result), kind="test", step=progress.step, **result)
        print(f"by category, and pictures: python evaluate.py {args.out / 'best.safetensors'}")
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + (signals or [signal.SIGTERM])[0])                               # as for a process that the signal ended


if __name__ == "__main__":
    run(main)
