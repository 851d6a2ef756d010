"""Train RSRefSeg. Read it top to bottom: arguments, device and seed, data, model, optimiser, schedule, resume, loop.

    python train.py --sam tiny                     draws its data, needs no download, minutes on two CPU cores
    python train.py --sam b                        the paper's recipe; fetches the pretrained towers once
    python train.py --sam b --resume

Writes into --out: last.safetensors and best.safetensors (by val gIoU; only what trains, settings in the metadata),
resume.pt (the same with optimiser and random state) and log.jsonl.
"""
import argparse
import json
import math
import os
import pickle
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import lora
from data import RRSISD, collate, positive, run, write_toy
from evaluate import AMP, default_amp, evaluate, line, scores
from rsrefseg import SIGLIP_HUB, SIZES, RSRefSeg, is_checkpoint, usable_device
from sam import SIZES as SAM_SIZES
from siglip import tokenize

# What `--sam tiny` does otherwise: no pretrained tower, so losses that teach them to agree, and a few epochs of a high rate.
TINY = dict(epochs=5, batch_size=8, total_batch=8, phrases=4, lr=2e-3, warmup_epochs=0.25, clip=1.0, dice=1.0,
            map_loss=1.0, workers=0, cache=True, val_every=1)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train RSRefSeg.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog="Defaults are the paper's (b, l). --sam tiny has its own: " +
                                     " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items()))
    add = parser.add_argument
    add("--sam", choices=list(SIZES), required=True, help="size of the model")
    # files
    add("--data", type=Path, help="folder in RRSIS-D's layout; unset data/rrsis-d, for tiny data/toy-SEED, drawn when missing")
    add("--out", type=Path, help="folder for checkpoints and logs; unset runs/SAM")
    add("--siglip", help=f"SigLIP weights: file, folder or hub name; unset {SIGLIP_HUB}, or those of --init")
    add("--sam-weights", help="SAM weights: file, folder, hub name or Meta's .pth; unset by size, or those of --init")
    add("--init", type=Path, help="start from this checkpoint: one of train.py, or one of the released code")
    add("--resume", action="store_true", help="continue the run in --out")
    # model
    add("--lora-rank", type=int, help="0 trains the whole towers; unset by size (16, tiny 0)")
    add("--lora-alpha", type=float, default=16, help="scale of the adapters, times the rank")
    add("--lora-dropout", type=float, default=0.1, help="dropout on the input of the adapters")
    # recipe
    add("--epochs", type=positive, default=200, help="passes over the training split")
    add("--batch-size", type=positive, default=4, help="images in memory at a time")
    add("--total-batch", type=positive, default=32, help="images per optimiser step; gradients accumulate up to it")
    add("--phrases", type=positive, default=1, help="phrases per image, for data with several: they share one encoding")
    add("--lr", type=float, default=1e-4, help="highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on everything that trains")
    add("--warmup-epochs", type=float, default=5, help="epochs of linear warm-up")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0 does not clip")
    add("--dice", type=float, default=0.0, help="weight of a Dice loss beside the paper's cross-entropy")
    add("--map-loss", type=float, default=0.0, help="weight of the same loss on the sentence map")
    # machine
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--amp", choices=list(AMP), help="autocast type; unset bf16 on CUDA, off elsewhere")
    add("--checkpoint-activations", action="store_true", help="keep less for the backward pass: half the memory, 4 tenths more time")
    add("--workers", type=int, default=4, help="processes that read images")
    add("--cache", action=argparse.BooleanOptionalAction, default=False, help="keep training data in memory; with --workers 0")
    add("--seed", type=int, default=0, help="of initial weights and order")
    add("--toy-seed", type=int, default=0, help="seed of the toy scenes, when they have to be drawn")
    add("--log-every", type=positive, default=50, help="optimiser steps between log lines")
    add("--val-every", type=positive, default=1, help="epochs between validations, each of which writes a checkpoint")
    if parser.parse_known_args(argv)[0].sam == "tiny":
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    args.draw = args.sam == "tiny" and args.data is None
    args.data = args.data or Path("data") / (f"toy-{args.toy_seed}" if args.draw else "rrsis-d")
    args.out = args.out or Path("runs") / args.sam
    args.amp = args.amp or default_amp(args.device)
    if args.sam == "tiny" and args.lora_rank:
        parser.error("--sam tiny has no pretrained towers that --lora-rank could adapt")
    if args.total_batch % args.batch_size:
        parser.error(f"--total-batch {args.total_batch} is no multiple of --batch-size {args.batch_size}")
    return args


def learning_rate(step, steps_per_epoch, args):
    """Linear from 0.01 x over the warm-up, whose last step has the whole rate, then cosine to 0.001 x at the end; step
    counts optimiser steps from 0. The released code takes the cosine in stairs of an epoch, and as if the run were longer
    by the warm-up: after the warm-up `step // steps_per_epoch * steps_per_epoch` for step, and --epochs 205, are theirs."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (0.01 + 0.99 * min(1, step / max(1, warmup - 1)))
    return args.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))


GROUPS = {"prompter.": "prompter", "sam.prompt_encoder.": "mask prompt", "sam.mask_decoder.": "mask decoder", "": "towers"}


def group_of(name):
    """The optimiser group of a parameter, by its name."""
    if name.endswith((".A.weight", ".B.weight")):
        return "lora"
    return next(group for prefix, group in GROUPS.items() if name.startswith(prefix))


def optimiser_groups(model, args):
    """Named AdamW groups of everything that trains. Weight decay acts on all of them, norms and
    biases too, as in the released code."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append(parameter)
    for name, parameters in groups.items():
        print(f"optimiser group {name}: {len(parameters)} tensors, {sum(p.numel() for p in parameters):,} parameters")
    return [dict(params=parameters, name=name, weight_decay=args.weight_decay) for name, parameters in groups.items()]


def batches(dataset, args, step, steps_per_epoch):
    """Training batches from optimiser step `step` on, without end. The order is drawn anew each epoch from (seed, epoch)
    alone, so a resumed run sees what an uninterrupted one would; the items over that fill no whole step are left out."""
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed * 100_003 + epoch))
        order = order[done * args.total_batch:steps_per_epoch * args.total_batch].tolist()
        yield from DataLoader(dataset, args.batch_size, sampler=order, collate_fn=collate, num_workers=args.workers,
                              pin_memory=args.device.startswith("cuda"))
        step = (epoch + 1) * steps_per_epoch


def log(args, text, **record):
    tqdm.write(text)
    with open(args.out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def save_atomically(state, path):
    torch.save(state, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def recipe(args):
    """The arguments that must not change under a run that is resumed."""
    free = ("resume", "out", "device", "workers", "cache", "log_every", "draw", "siglip", "sam_weights",
            "checkpoint_activations")
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def initial_model(args):
    """The model that training starts from. Raises FileNotFoundError or ValueError naming the file that does not fit."""
    dtype = AMP[args.amp] or torch.float32
    settings = dict(lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    if not args.init:
        if args.sam == "tiny":
            return RSRefSeg(args.sam, **settings)
        return RSRefSeg.from_pretrained(args.sam, args.siglip or SIGLIP_HUB, args.sam_weights, dtype=dtype, **settings)
    if is_checkpoint(args.init):
        model = RSRefSeg.from_checkpoint(args.init, args.siglip, args.sam_weights, dtype)
    else:
        model = RSRefSeg.load_official(args.init, args.siglip or SIGLIP_HUB, dtype=dtype, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    wanted = dict(settings, sam=args.sam, lora_rank=SIZES[args.sam].lora_rank if args.lora_rank is None else args.lora_rank)
    other = [f"--{name.replace('_', '-')} {model.settings[name]}" for name, value in wanted.items() if model.settings[name] != value]
    if other:
        raise ValueError(f"{args.init} was trained otherwise: give {' '.join(other)} here too, or choose another --init.")
    return model


def load_resume(path, wanted):
    """resume.pt -> its state. Raises ValueError if it is broken or belongs to another recipe."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole resume file ({error}). Start anew with another --out.") from error
    changed = [f"--{name.replace('_', '-')} {state['recipe'].get(name)} -> {value}"
               for name, value in wanted.items() if state["recipe"].get(name, "None") != value]
    if changed:
        raise ValueError(f"{path} belongs to another recipe: {', '.join(changed)}. Resume with the run's own arguments.")
    return state


def main(argv=None):
    args = parse_args(argv)
    device = torch.device(args.device)
    amp = AMP[args.amp]
    torch.manual_seed(args.seed)
    if (args.out / "resume.pt").exists() != args.resume:
        raise ValueError(f"{args.out} holds no run to resume: start without --resume." if args.resume else
                         f"{args.out} already holds a run: continue it with --resume, or name another folder with --out.")

    # ------------------------------------------------------------------------------------------------ data
    if args.draw and not (args.data / "rrsisd" / "refs(unc).p").exists():
        write_toy(args.data, seed=args.toy_seed)
    side = SAM_SIZES[SIZES[args.sam].sam].image
    train_set = RRSISD(args.data, "train", side, args.phrases, args.cache)
    val_set, test_set = RRSISD(args.data, "val", side), RRSISD(args.data, "test", side)
    for split in (train_set, val_set, test_set):
        print(split)
    steps_per_epoch = len(train_set) // args.total_batch
    if not steps_per_epoch:
        raise ValueError(f"--total-batch {args.total_batch} exceeds the {len(train_set)} training items in {args.data}: lower it.")
    total, accumulate = args.epochs * steps_per_epoch, args.total_batch // args.batch_size
    print(f"{steps_per_epoch} steps of {args.total_batch} images x {args.phrases} phrases an epoch ({accumulate} x "
          f"{args.batch_size} images), {total} steps in all, autocast {args.amp}, {device}")

    # ------------------------------------------------------------------------------------------------ model and optimiser
    model = initial_model(args)
    for encoder in (model.siglip.text_model.encoder, model.siglip.vision_model.encoder, model.sam.vision_encoder):
        encoder.checkpoint = args.checkpoint_activations
    model.to(device, memory_format=torch.channels_last)                                # convolutions run faster in this layout
    print(lora.table(model))
    optimiser = torch.optim.AdamW(optimiser_groups(model, args), args.lr, betas=(0.9, 0.999), fused=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in optimiser.param_groups for p in group["params"]) == sorted(map(id, parameters))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")            # bf16 has fp32's range and needs none

    args.out.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------ resume
    step, best = 0, -1.0
    if args.resume:
        state = load_resume(args.out / "resume.pt", recipe(args))
        model.copy_trained(state["model"], state["settings"], args.out / "resume.pt")
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])
        step, best = state["step"], state["best"]
        print(f"resumed {args.out} at step {step}, best val gIoU {best:.2f}")

    # ------------------------------------------------------------------------------------------------ loop
    stream, started, since = batches(train_set, args, step, steps_per_epoch), time.time(), step
    running = torch.zeros((), device=device)
    model.train()
    with tqdm(total=total, initial=step, unit="step", desc=f"training {args.sam}") as bar:
        while step < total:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps_per_epoch, args)
            for _ in range(accumulate):
                batch = next(stream)
                images, masks = (batch[key].to(device, non_blocking=True) for key in ("images", "masks"))
                ids, mask = (x.to(device) for x in tokenize(model.tokenizer, [ref.phrase for ref in batch["refs"]]))
                taps = {}
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    logits = model(images / 255, ids, mask, taps)
                loss = model.loss(logits, masks, args.dice)
                if args.map_loss:
                    loss = loss + args.map_loss * model.map_loss(taps["sentence_map"], masks, args.dice)
                scaler.scale(loss / accumulate).backward()
                running += loss.detach() / accumulate
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            log_now = step % args.log_every == 0 or step == total
            validate_now = step % (args.val_every * steps_per_epoch) == 0 or step == total
            if (log_now or validate_now) and not running.isfinite():                           # before anything good is overwritten
                samples = [ref.ref_id for ref in batch["refs"]]
                raise ValueError(f"the loss became {running.item()} by step {step}, last samples {samples}. Lower --lr, set --clip, "
                                 f"or use --amp off; what {args.out} holds is from before.")
            if log_now:
                took, n = (time.time() - started) / (step - since), step - since
                record = dict(step=step, epoch=step / steps_per_epoch, loss=running.item() / n, lr=optimiser.param_groups[0]["lr"],
                              gnorm=norm.item() if norm.isfinite() else None, seconds_per_step=took, images_per_second=args.total_batch / took,
                              gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None)
                log(args, f"train e {record['epoch']:06.2f} step {step:06d}/{total:06d} | loss {record['loss']:.4f} | "
                    f"lr {record['lr']:.2e} | gnorm {norm:.2f} | {took:.2f} s/it | {record['images_per_second']:.1f} img/s" +
                    (f" | {record['gib']:.1f} GB" if record["gib"] else ""), kind="train", **record)
                running.zero_()
                started, since = time.time(), step

            if validate_now:
                began = time.time()
                result = scores(evaluate(model, val_set, args.batch_size, amp, args.workers))
                model.train()
                better, best = result["gIoU"] > best, max(best, result["gIoU"])
                about = dict(args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, step=step, val=result)
                model.save(args.out / "last.safetensors", **about)
                if better:
                    model.save(args.out / "best.safetensors", **about)
                save_atomically(dict(step=step, best=best, model=lora.trained_state_dict(model), settings=model.settings,
                                     optimiser=optimiser.state_dict(), scaler=scaler.state_dict(), recipe=recipe(args),
                                     random=torch.get_rng_state(), random_cuda=torch.cuda.get_rng_state_all()),
                                args.out / "resume.pt")
                log(args, line(f"val   e {step / steps_per_epoch:06.2f} step {step:06d}", result) +
                    f" | {time.time() - began:.0f} s" + f" | best -> {args.out / 'best.safetensors'}" * better,
                    kind="val", step=step, **result)
                started += time.time() - began

    # ------------------------------------------------------------------------------------------------ the final score, once
    model.load_trained(args.out / "best.safetensors")
    result = scores(evaluate(model, test_set, args.batch_size, amp, args.workers))
    log(args, line("test ", result), kind="test", step=step, **result)


if __name__ == "__main__":
    run(main)
