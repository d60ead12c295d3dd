"""Pretrain the small SDXL: first the autoencoder, then UNet and text encoders together.

    python tools/pretrain_small.py vae --steps 12000
    python tools/pretrain_small.py diffusion --steps 60000
    python tools/pretrain_small.py publish
    python tools/pretrain_small.py score        # of 128 captions that the log's scores do not use

Everything lives in the state folder: weights, averages, optimizer, a log of losses and scores (log.jsonl). A stage
saves every two minutes and continues where it was stopped; a resumed run equals one that never stopped. `publish`
writes checkpoints/sd_xl_small.safetensors and the scale factor in the two YAML files; `restore` begins a new state
folder from them, so that training can go on where that of another machine ended. Needs PyTorch
(see torch_twin.py); a GPU is used where --device says so. Two processes of one thread share a batch better than one
process of two threads, above all on a busy machine:

    torchrun --standalone --nproc_per_node 2 tools/pretrain_small.py vae --threads 1
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm.atomic_file import atomic_file  # noqa: E402
from gm.conditioning.tokenizer import Tokenizer  # noqa: E402
from gm.diffusion.denoiser import DiscreteDenoiser, EpsScaling  # noqa: E402
from gm.diffusion.discretizer import LegacyDDPMDiscretization  # noqa: E402
from gm.diffusion.guiders import VanillaCFG  # noqa: E402
from gm.diffusion.loss import StandardDiffusionLoss  # noqa: E402
from gm.diffusion.samplers import EulerEDMSampler, noise_streams  # noqa: E402
from tools.small_world.captions import caption, full_caption, gate_attributes  # noqa: E402
from tools.small_world.draw import contact_sheet  # noqa: E402
from tools.small_world.renderer import SIDE, pretraining_scene, render, sample_scene  # noqa: E402
from tools.small_world.scorer import accuracy  # noqa: E402
from tools.torch_twin import SmallSDXL, initialise  # noqa: E402

CONFIG = "configs/training/sd_xl_small_textual_inversion.yaml"
CONFIGS = (CONFIG, "configs/inference/sd_xl_small.yaml")
WEIGHTS = "checkpoints/sd_xl_small.safetensors"
SIZES = (SIDE, SIDE, 0, 0, SIDE, SIDE)  # original size, crop, target size of every picture
SAVE_SECONDS = 120


@dataclass(frozen=True)
class Settings:
    """What a stage trains with; recorded in its state."""

    steps: int
    batch: int
    lr: float
    warmup: int = 50
    decay: float = 0.25  # the last share of the steps, over which lr falls to 2 %
    average: float = 0.999  # of the exponential moving average of weights
    seed: int = 0

    def lr_at(self, step):
        fall = (self.steps - step) / max(self.decay * self.steps, 1)
        return self.lr * min(1, (step + 1) / self.warmup, max(0.02, fall))


# ---------------------------------------------------------------- optimizer


def orthogonalise(g):
    """(n, rows, columns) -> matrices whose singular values are about 1 (Newton-Schulz of degree 5, Jordan 2024)."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Optimizer:
    """Muon on matrices and convolutions, AdamW on the rest, and an average of the weights.

    Muon (Jordan 2024): the direction is the orthogonalised momentum, scaled to the size of an Adam step (Liu et al.
    2025, sec. 2.2). Embeddings move a tenth as fast: they are small, and stay so.

    Args:
        named: dict of parameters.
    """

    def __init__(self, named, *, average, weight_decay=0.02):
        self.weight_decay, self.decay_of_average, self.count = weight_decay, average, 0
        is_edge = re.compile(r"embedding|conv_in|conv_out|quant_conv|input_blocks\.0\.0|\.out\.2").search
        self.matrices = {n: p for n, p in named.items() if p.ndim > 1 and not is_edge(n)}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.by_shape = {}
        for p in self.matrices.values():
            self.by_shape.setdefault((len(p), p[0].numel()), []).append(p)
        self.momentum = {n: torch.zeros_like(p) for n, p in named.items()}
        self.square = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.average = {n: p.detach().clone() for n, p in named.items()}

    @torch.no_grad()
    def step(self, lr):
        self.count += 1
        parameters = [*self.matrices.values(), *self.others.values()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        names = {id(p): n for n, p in (self.matrices | self.others).items()}
        torch._foreach_mul_([p for p in parameters if p.ndim > 1], 1 - lr * self.weight_decay)
        for (rows, columns), group in self.by_shape.items():
            momenta = [self.momentum[names[id(p)]] for p in group]
            gradients = [p.grad for p in group]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)
            moves = orthogonalise(torch.stack([m.reshape(rows, columns) for m in ahead]))
            for p, move in zip(group, moves):
                p.sub_(move.reshape(p.shape), alpha=lr * 0.2 * max(rows, columns) ** 0.5)
        for n, p in self.others.items():
            self.momentum[n].lerp_(p.grad, 0.1)
            self.square[n].lerp_(p.grad.square(), 0.01)
            move = self.momentum[n] / (1 - 0.9**self.count)
            move /= (self.square[n] / (1 - 0.99**self.count)).sqrt_().add_(1e-8)
            p.sub_(move, alpha=lr * (0.1 if "embedding" in n else 1.0))
        keep = min(self.decay_of_average, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_([self.average[names[id(p)]] for p in parameters], parameters, 1 - keep)

    def state(self):
        return {k: getattr(self, k) for k in ("count", "momentum", "square", "average")}

    def load(self, state):
        self.count = state["count"]
        for kind in ("momentum", "square", "average"):
            for n, tensor in getattr(self, kind).items():
                tensor.copy_(state[kind][n])


# ---------------------------------------------------------------- a stage: steps, saving, logging


class Stage:
    """One training run: a network's part, its optimizer, and the files it lives in.

    A subclass has `name`, `prefixes` (of its parameters), `loss(rng) -> scalar` and `scores() -> dict`.
    All chance comes from (seed, stage, step), so no random state needs to be kept. Processes of a torch.distributed
    group draw the same batch, and each takes its `share` of it.
    """

    name: str
    prefixes: tuple[str, ...]

    def __init__(self, net, folder, settings, *, device="cpu"):
        self.net, self.folder, self.settings, self.device, self.done = net, Path(folder), settings, device, 0
        self.extra = {}
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.named = {n: p for n, p in net.named_parameters() if n.startswith(self.prefixes)}
        for n, p in net.named_parameters():
            p.requires_grad_(n in self.named)
        self.optimizer = Optimizer(self.named, average=settings.average)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            with torch.no_grad():
                for n, p in self.named.items():
                    p.copy_(state["weights"][n])
            self.optimizer.load(state["optimizer"])
            self.done = state["done"]

    @property
    def path(self):
        return self.folder / f"{self.name}.pt"

    def share(self, array):
        """This process's part of a batch."""
        return array[self.rank :: self.ranks]

    def save(self):
        if self.rank > 0:
            return
        state = {"done": self.done, "weights": dict(self.named), "optimizer": self.optimizer.state()}
        with atomic_file(self.path) as file:
            torch.save(state | self.extra | {"settings": vars(self.settings)}, file)

    def log(self, **values):
        if self.rank > 0:
            return
        line = {"stage": self.name, "step": self.done, "time": time.strftime("%F %T"), **values}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def rng(self):
        return np.random.default_rng((self.settings.seed, *self.name.encode(), self.done))

    def step(self):
        with self.autocast():
            loss = self.loss(self.rng())
        for p in self.named.values():
            p.grad = torch.zeros_like(p)  # not None: the last layer of text encoder 1 is not used
        loss.backward()
        if self.ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in self.named.values()])
            dist.all_reduce(flat)
            parts = (flat / self.ranks).split([p.numel() for p in self.named.values()])
            for p, part in zip(self.named.values(), parts):
                p.grad = part.view_as(p)
        self.optimizer.step(self.settings.lr_at(self.done))
        self.done += 1
        return loss.item()

    def run(self, *, log_every=100, score_every=2000):
        losses, saved, since, cpu = [], time.time(), time.time(), time.process_time()
        while self.done < self.settings.steps:
            losses.append(self.step())
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"Loss {losses[-1]} at step {self.done}; {self.path} is the last good state.")
            if self.done % log_every == 0:
                numbers = {
                    "loss": float(np.mean(losses)),
                    "per_s": self.settings.batch * len(losses) / (time.time() - since),
                    "cpu_s": time.process_time() - cpu,
                    "lr": self.settings.lr_at(self.done),
                }
                self.log(**{name: float(f"{value:.4g}") for name, value in numbers.items()})
                losses, since, cpu = [], time.time(), time.process_time()
            last = self.done == self.settings.steps
            if last or time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            if self.rank == 0 and (last or self.done % score_every == 0):
                with self.averaged(), torch.no_grad(), self.autocast():
                    self.log(**self.scores())
                since, cpu = time.time(), time.process_time()

    def averaged(self):
        return _Averaged(self)


class _Averaged:
    """Inside, the network has its averaged weights."""

    def __init__(self, stage):
        self.stage = stage

    def __enter__(self):
        self.kept = {n: p.detach().clone() for n, p in self.stage.named.items()}
        self._set(self.stage.optimizer.average)

    def __exit__(self, *_):
        self._set(self.kept)

    @torch.no_grad()
    def _set(self, weights):
        for n, p in self.stage.named.items():
            p.copy_(weights[n])


def to_pixels(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_images(pictures, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- the autoencoder


class VAEStage(Stage):
    """L1 + MSE + a little KL; crops around the toy until the last third, whole pictures then.

    A crop of half the side costs a quarter, and shows as many edges: the rest of a picture is plain background.
    """

    name = "vae"
    prefixes = ("first_stage_model.",)
    kl_weight = 3e-4

    def __init__(self, net, folder, settings, *, device="cpu", pictures=8000, crop=SIDE // 2):
        super().__init__(net, folder, settings, device=device)
        self.crop = crop
        self.scenes = [pretraining_scene(settings.seed, i) for i in range(pictures)]
        self.pictures = np.stack([render(scene) for scene in self.scenes])

    def batch(self, rng):
        whole = self.done >= 2 * self.settings.steps // 3
        number = max(self.settings.batch // 4, self.ranks) if whole else self.settings.batch
        chosen = self.share(rng.integers(len(self.pictures), size=number))
        if whole:
            return self.pictures[chosen]
        crops = []
        for i, shift in zip(chosen, self.share(rng.uniform(-22, 22, (number, 2)))):
            item = self.scenes[i].items[0]
            centre = np.array((item.y, item.x)) + shift
            top, left = (centre - self.crop / 2).round().astype(int).clip(0, SIDE - self.crop)
            crops.append(self.pictures[i, top : top + self.crop, left : left + self.crop])
        return np.stack(crops)

    def loss(self, rng):
        x = to_images(self.batch(rng), self.device)
        vae = self.net.first_stage_model
        mean, logvar = vae.encode(x).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        noise = rng.standard_normal((len(mean) * self.ranks, *mean.shape[1:]), dtype=np.float32)
        noise = torch.from_numpy(self.share(noise)).to(self.device)
        error = vae.decode(mean + (0.5 * logvar).exp() * noise).float() - x
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + self.kl_weight * kl

    def scores(self, number=64):
        attributes = gate_attributes(number, seed=1)
        rng = np.random.default_rng(1)
        pictures = np.stack([render(sample_scene(rng, a)) for a in attributes])
        x = to_images(pictures, self.device)
        vae = self.net.first_stage_model
        mean = torch.cat([vae.encode(part).float().chunk(2, 1)[0] for part in x.split(16)])
        y = torch.cat([vae.decode(part).float() for part in mean.split(16)]).clamp(-1, 1)
        psnr = 10 * np.log10(4 / (y - x).square().mean().item())
        contact_sheet([p for pair in zip(pictures[:24], to_pixels(y)[:24]) for p in pair]).save(self.folder / "vae.png")
        shares = {k: round(v, 3) for k, v in accuracy(to_pixels(y), attributes).items()}
        return {"psnr": round(psnr, 2), "latent_std": round(mean.std().item(), 4), "round_trip": shares}


# ---------------------------------------------------------------- UNet and text encoders


class DiffusionStage(Stage):
    """Noise prediction by gm's loss, weighted so that the noisy levels, where captions decide, count more.

    Relative to plain eps weighting a level counts min(1 + sigma^2, 6 sigma^2, 5): v weighting (Salimans and Ho 2022)
    with min-SNR (Hang et al. 2023) at the clean end and a limit at the noisy end. Captions that say nothing, and
    5 % more, are trained as zeros, which is how SDXL base is sampled without a negative prompt.
    """

    name = "diffusion"
    prefixes = ("model.", "conditioner.")
    noises = 4  # noise draws a picture: text is the dearer half at these widths

    def __init__(self, net, folder, settings, *, device="cpu", pictures=20000, tokenizer_path=None):
        super().__init__(net, folder, settings, device=device)
        vae_steps = load_averages(net, folder, "vae")["done"]
        self.tokenizers = [
            Tokenizer(str(tokenizer_path or ROOT / "checkpoints/sd_xl_small_tokenizer"), max_length=length, pad=pad)
            for length, pad in zip(_lengths(net), ("eos", 0))
        ]
        self.ids = functools.lru_cache(100_000)(lambda text: [t.encode([text])[0, 0] for t in self.tokenizers])
        levels = LegacyDDPMDiscretization()
        self.denoiser = DiscreteDenoiser(EpsScaling(), levels, 1000)
        self.objective = StandardDiffusionLoss(loss_weighting=self.weighting)
        self.sampler = EulerEDMSampler(levels, num_steps=16, guider=VanillaCFG(4.0))
        self.scenes = [pretraining_scene(settings.seed, i) for i in range(pictures)]
        self.moments = self.encode_pictures(vae_steps)
        self.scale = scale_factor(self.moments)
        self.extra = {"scale": self.scale}

    @staticmethod
    def weighting(sigma):
        return np.minimum(np.minimum(1 + sigma**2, 6 * sigma**2), 5) / 3 / sigma**2

    def encode_pictures(self, vae_steps):
        """Moments of all pictures (n, 8, h, w) float16, kept in the state folder."""
        shown = zlib.crc32(repr(self.scenes).encode())
        path = self.folder / f"moments_{vae_steps}_{len(self.scenes)}_{shown:08x}.npy"
        if path.exists():
            return np.load(path)
        mine, parts = self.share(self.scenes), []
        for start in range(0, len(mine), 100):
            x = to_images(np.stack([render(s) for s in mine[start : start + 100]]), self.device)
            with torch.no_grad(), self.autocast():
                parts.append(self.net.first_stage_model.encode(x).float().cpu().numpy().astype(np.float16))
            if start % 1000 == 0:
                print(f"encoding pictures: {start} of {len(mine)}", flush=True)
        everyone = [np.concatenate(parts)] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(everyone, everyone[0])
        moments = np.empty((len(self.scenes), *everyone[0].shape[1:]), np.float16)
        for rank, part in enumerate(everyone):
            moments[rank :: self.ranks] = part
        if self.rank == 0:
            with atomic_file(path) as file:
                np.save(file, moments)
        return moments

    def conditions(self, captions, keep):
        ids1, ids2 = (np.stack(ids) for ids in zip(*map(self.ids, captions)))
        arrays = ids1.astype(np.int64), ids2.astype(np.int64), np.tile(np.float32(SIZES), (len(keep), 1)), keep
        return self.net.conditioner(*(torch.from_numpy(a).to(self.device) for a in arrays))

    def loss(self, rng):
        batch = self.settings.batch
        chosen = rng.integers(len(self.moments), size=batch // self.noises)
        captions = [caption(self.scenes[i], rng) for i in chosen]
        keep = np.float32([[bool(text) and rng.random() > 0.05] for text in captions])
        # Evenly spread over the noise levels: every step sees all of them.
        levels = (1000 * (rng.permutation(batch) + rng.random(batch)) / batch).astype(int)
        draws = rng.standard_normal((2, batch, 4, *self.moments.shape[2:]), dtype=np.float32)

        chosen, captions, keep = map(self.share, (chosen, captions, keep))
        sigma, (of_posterior, eps) = self.denoiser.sigmas[self.share(levels)], map(self.share, draws)
        mean, logvar = np.split(self.moments[chosen.repeat(self.noises)].astype(np.float32), 2, 1)
        z0 = (mean + np.exp(0.5 * logvar) * of_posterior) * self.scale
        arrays = self.objective.prepare(self.denoiser, z0, eps=eps, sigma=sigma)
        x, t, target, weight = (torch.from_numpy(a).to(self.device) for a in arrays)
        y, context = (c.repeat_interleave(self.noises, 0) for c in self.conditions(captions, keep))
        x = x.contiguous(memory_format=torch.channels_last)
        output = self.net.model.diffusion_model(x, t, context, y).float()
        return (weight * (output - target).square().mean((1, 2, 3))).mean()

    @torch.no_grad()
    def sample(self, captions, *, seed=0, part=32):
        """Pictures (n, 64, 64, 3) uint8, one a caption."""
        pictures = []
        for start in range(0, len(captions), part):
            texts = captions[start : start + part]
            cond, uc = (
                dict(zip(("vector", "crossattn"), self.conditions(texts, np.full((len(texts), 1), keep, np.float32))))
                for keep in (1, 0)
            )
            cond, uc = ({k: v.float().cpu().numpy() for k, v in c.items()} for c in (cond, uc))

            def network(x, t, c):
                args = (torch.from_numpy(a).to(self.device) for a in (x, t, c["crossattn"], c["vector"]))
                return self.net.model.diffusion_model(*args).float().cpu().numpy()

            seeds = [(seed, start + i) for i in range(len(texts))]
            noise = noise_streams(seeds, (4, *self.moments.shape[2:]))()
            z = self.sampler(lambda *a: self.denoiser(network, *a), noise, cond, uc) / self.scale
            pictures.append(to_pixels(self.net.first_stage_model.decode(torch.from_numpy(z).to(self.device))))
        return np.concatenate(pictures)

    def scores(self, number=64, *, seed=2):
        attributes = gate_attributes(number, seed=seed)
        pictures = self.sample([full_caption(a) for a in attributes])
        contact_sheet(pictures).save(self.folder / "diffusion.png")
        shares = {k: round(v, 3) for k, v in accuracy(pictures, attributes).items()}
        return {"samples": self.done * self.settings.batch, "gate": shares}


def _lengths(net):
    clip, open_clip = net.conditioner.embedders
    tables = clip.transformer.text_model.embeddings.position_embedding.weight, open_clip.model.positional_embedding
    return [len(table) for table in tables]


def scale_factor(moments):
    """1 / standard deviation of latents drawn from these moments, to four digits."""
    mean, logvar = np.split(moments[:2000].astype(np.float64), 2, 1)
    return float(f"{(mean.var() + np.exp(logvar).mean()) ** -0.5:.4g}")


def load_averages(net, folder, stage):
    """Put a stage's averaged weights into the network; returns the stage's whole state.

    Raises:
        FileNotFoundError: the stage has not been trained.
    """
    path = Path(folder) / f"{stage}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train the stage '{stage}' first.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    named = dict(net.named_parameters())
    with torch.no_grad():
        for n, tensor in state["optimizer"]["average"].items():
            named[n].copy_(tensor)
    return state


def publish(net, folder, root):
    """Write the averaged weights in fp16 under the original names, and the scale factor into the YAML files."""
    load_averages(net, folder, "vae")
    scale = load_averages(net, folder, "diffusion")["scale"]
    weights = {n: p.detach().half().contiguous() for n, p in net.state_dict().items()}
    path = Path(root) / WEIGHTS
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(weights))
    for name in CONFIGS:
        text = (Path(root) / name).read_text()
        (Path(root) / name).write_text(re.sub(r"(?m)^(    scale_factor:) .*$", rf"\1 {scale}", text))
    print(f"{path}: {len(weights)} tensors, {path.stat().st_size / 1e6:.1f} MB, scale_factor {scale}")


def restore(net, folder, root):
    """Begin a new state folder with the published weights; optimizers start afresh.

    Raises:
        ValueError: the folder has a state already.
    """
    net.load_state_dict(safetensors.torch.load_file(Path(root) / WEIGHTS))
    for kind in (VAEStage, DiffusionStage):
        if (Path(folder) / f"{kind.name}.pt").exists():
            raise ValueError(f"{folder} has a state of the stage '{kind.name}'; choose another --state.")
        stage = kind.__new__(kind)
        Stage.__init__(stage, net, folder, Settings(steps=0, batch=0, lr=0.0))
        stage.save()


def build(root=ROOT, *, seed=0, device="cpu"):
    params = yaml.safe_load((Path(root) / CONFIG).read_text())["model"]["params"]
    net = SmallSDXL(params)
    initialise(net, generator=torch.Generator().manual_seed(seed))
    return net.to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("vae", "diffusion", "publish", "restore", "score"))
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sdxl_small_pretrain"
    parser.add_argument("--state", type=Path, default=default, help=f"folder of the state (default {default})")
    parser.add_argument("--steps", type=int, help="of the whole stage, those done before included")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--decay", type=float, default=0.25, help="last share of the steps, over which lr falls")
    parser.add_argument("--pictures", type=int, help="size of the training set")
    parser.add_argument("--score_every", type=int, default=2000, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    net = build(seed=args.seed, device=args.device)
    if args.stage in ("publish", "restore"):
        return {"publish": publish, "restore": restore}[args.stage](net, args.state, ROOT)
    stage_type, steps, batch, lr, pictures = {
        "vae": (VAEStage, 12000, 16, 2e-3, 8000),
        "diffusion": (DiffusionStage, 60000, 64, 2e-3, 20000),
        "score": (DiffusionStage, 1, 64, 2e-3, 2000),
    }[args.stage]
    settings = Settings(
        args.steps or steps, args.batch or batch, args.lr or lr, decay=args.decay, seed=args.seed
    )
    stage = stage_type(net, args.state, settings, device=args.device, pictures=args.pictures or pictures)
    if args.stage == "score":
        with stage.averaged(), torch.no_grad(), stage.autocast():
            print(json.dumps(stage.scores(128, seed=5)))
    else:
        stage.run(score_every=args.score_every)


if __name__ == "__main__":
    main()
