"""What diffusers and transformers compute with the tiny SDXL: the numbers that gm must reproduce.

    pip install -r tests/peers/requirements.txt
    python -m tests.reference.make_reference          # writes tests/reference/tiny_sdxl.npz

The weights are those of tests/tiny.py, in the original single-file layout; the way from there into diffusers'
models is diffusers' own (its converters for original files). Everything is fp32 on the CPU. Arrays, by name:

seed                    of the weights (`tiny_state_dict(seed)`) and of all inputs
text/prompts (P,)       with text/token standing for all its vectors
text/ids_l, ids_g       (P, 77) int64; encoder 1 pads with <|endoftext|>, encoder 2 with 0
text/rows_l, rows_g     (3, width) learned rows of the three placeholder ids, vocab .. vocab + 2
text/hidden_l, hidden_g (P, 77, width) penultimate states, no final norm; text/pooled (P, 48) at the first end
size/numbers, embedded  (2, 6) and (2, 1536)
unet/x_N, t_N, out_N    N = batch size 1 or 2: inputs (R, N, 4, h, w), timesteps (R, N), outputs; a row a call
unet/context, vector    (2, 77, 80) and (2, 1584); a batch of 1 takes the first
refiner/...             the same for the refiner's UNet, one call of batch 1
vae/image, moments      (2, 3, 48, 64) in [-1, 1] -> (2, 8, 6, 8), mean | logvar; vae/z, decoded the way back
sample/noise            (1, 4, 8, 8) of unit variance; sample/guidance; sample/timesteps (20,)
sample/cond_*, uncond_* context (1, 77, 80) and vector (1, 1584); sample/euler, heun, dpmpp_2m final latents
train/latents (4, 4, 8, 8), noise (10, 4, 4, 8, 8), timesteps (10, 4), ids_l, ids_g (4, 77), sizes (4, 6)
train/rows_l, rows_g    (2, width) rows to start from; train/lr, weight_decay, max_grad_norm
train/grad_l, grad_g    gradient of the first batch's loss
train/CASE/losses (10,), grad_norms (10,), rows_l, rows_g   CASE: free or clipped; norms before clipping
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as original
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import CONFIGS, TOKENIZER, VOCAB, write_tiny_weights

OUTPUT = Path(__file__).parent / "tiny_sdxl.npz"
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
END = VOCAB - 1
TOKEN = "<toy>"
PROMPTS = [
    "",
    "a red cat on the table",
    "a painting of <toy> at night, a small dog and zebras",
    "nice <toy> " + "big blue house " * 30,  # cut at 77
]


class ExtendedTable(torch.nn.Module):
    """A frozen token table with learned rows after its end."""

    def __init__(self, table, rows):
        super().__init__()
        self.table, self.rows = table, rows

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.table, self.rows]))


class TextEncoder:
    """One of SDXL's text encoders as diffusers' pipelines use it: penultimate state and pooled vector."""

    def __init__(self, state, prefix, embedder):
        size = embedder["params"]
        config = CLIPTextConfig(
            vocab_size=size["vocab_size"],
            hidden_size=size["width"],
            intermediate_size=4 * size["width"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            max_position_embeddings=77,
            hidden_act="gelu" if "embed_dim" in size else "quick_gelu",
            projection_dim=size.get("embed_dim", size["width"]),
            bos_token_id=VOCAB - 2,
            eos_token_id=END,
            pad_token_id=END,
        )
        self.model = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        if "embed_dim" in size:
            weights = original.convert_open_clip_checkpoint(self.model, state, prefix=prefix)
        else:
            weights = original.convert_ldm_clip_checkpoint(state, remove_prefix=prefix)
            weights["text_projection.weight"] = torch.eye(size["width"])
        _load(self.model, weights)
        self.table = self.model.get_input_embeddings().weight

    def __call__(self, ids, rows=None):
        rows = self.table.new_zeros(0, self.table.shape[1]) if rows is None else rows
        self.model.set_input_embeddings(ExtendedTable(self.table, rows))
        out = self.model(ids, output_hidden_states=True)
        end = (ids == END).int().argmax(dim=1)
        pooled = self.model.text_projection(out.last_hidden_state[torch.arange(len(ids)), end])
        assert torch.equal(pooled, out.text_embeds), "transformers pools somewhere else"
        return out.hidden_states[-2], pooled


def _load(model, weights):
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left_over = [name for name in unexpected if not name.endswith("position_ids")]
    assert not missing and not left_over, (missing, left_over)


def load_unet(state, config):
    settings = original.create_unet_diffusers_config_from_ldm(config, state)
    # diffusers recognises SDXL's size conditioning by the real context widths, which a toy does not have.
    settings.update(addition_embed_type="text_time", addition_time_embed_dim=256, class_embed_type=None)
    unet = UNet2DConditionModel(**settings).eval().requires_grad_(False)
    _load(unet, original.convert_ldm_unet_checkpoint(state, unet.config))
    return unet


def load_vae(state, config):
    vae = AutoencoderKL(**original.create_vae_diffusers_config_from_ldm(config, state))
    _load(vae, original.convert_ldm_vae_checkpoint(state, vae.config))
    return vae.eval().requires_grad_(False)


class TinySDXL:
    def __init__(self, seed, *, kind="base"):
        config = yaml.safe_load(CONFIGS[kind].read_text())
        with tempfile.TemporaryDirectory() as folder:
            state = load_file(write_tiny_weights(Path(folder) / "tiny.safetensors", seed=seed, kind=kind))
        embedders = config["model"]["params"]["conditioner_config"]["params"]["emb_models"]
        if kind == "base":
            self.clip_l = TextEncoder(state, "conditioner.embedders.0.transformer.", embedders[0])
            self.clip_g = TextEncoder(state, "conditioner.embedders.1.model.", embedders[1])
        self.unet = load_unet(state, config)
        self.vae = load_vae(state, config)

    def encode_text(self, ids_l, ids_g, rows=(None, None)):
        hidden_l, _ = self.clip_l(ids_l, rows[0])
        hidden_g, pooled = self.clip_g(ids_g, rows[1])
        return torch.cat([hidden_l, hidden_g], dim=-1), pooled

    def predict_noise(self, x, timesteps, context, pooled, sizes):
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, timesteps, encoder_hidden_states=context, added_cond_kwargs=added).sample

    def vector(self, pooled, sizes):
        """The UNet's vector conditioning, as its text_time embedding puts it together."""
        return torch.cat([pooled, self.unet.add_time_proj(sizes.flatten()).reshape(len(sizes), -1)], dim=1)


def tokenize(prompts, num_vectors):
    """The (P, 77) ids for both encoders, the token expanded as diffusers does it."""
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    tokens = [TOKEN, *(f"{TOKEN}_{i}" for i in range(1, num_vectors))]
    assert tokenizer.add_tokens(tokens) == num_vectors
    expanded = [prompt.replace(TOKEN, " ".join(tokens)) for prompt in prompts]
    ids = tokenizer(
        expanded, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    after_end = torch.cumsum(ids == END, dim=1) - (ids == END).int() > 0
    return ids, ids.masked_fill(after_end, 0)


@torch.no_grad()
def text_and_networks(model, refiner, draw):
    ids_l, ids_g = tokenize(PROMPTS, 3)
    rows = 0.05 * draw(3, 32), 0.05 * draw(3, 48)
    context, pooled = model.encode_text(ids_l, ids_g, rows)
    hidden_l, hidden_g = context.split([32, 48], dim=-1)
    yield (
        "text",
        dict(
            prompts=np.array(PROMPTS),
            token=np.array(TOKEN),
            ids_l=ids_l,
            ids_g=ids_g,
            rows_l=rows[0],
            rows_g=rows[1],
            hidden_l=hidden_l,
            hidden_g=hidden_g,
            pooled=pooled,
        ),
    )

    context, pooled = context[1:3], pooled[1:3]
    sizes = torch.tensor([[1024.0, 768, 0, 0, 1024, 1024], [4031, 3023, 16, 271, 512, 640]])
    vector = model.vector(pooled, sizes)
    yield "size", dict(numbers=sizes, embedded=vector[:, 48:])

    x_1, t_1 = draw(1, 1, 4, 12, 8), torch.tensor([[500]])
    x_2, t_2 = draw(5, 2, 4, 8, 8), torch.tensor([[0, 999], [1, 250], [250, 250], [500, 1], [999, 0]])
    out_1 = [
        model.predict_noise(x, t, context[:1], pooled[:1], sizes[:1]) for x, t in zip(x_1, t_1, strict=True)
    ]
    out_2 = [model.predict_noise(x, t, context, pooled, sizes) for x, t in zip(x_2, t_2, strict=True)]
    yield (
        "unet",
        dict(
            x_1=x_1,
            t_1=t_1,
            out_1=torch.stack(out_1),
            x_2=x_2,
            t_2=t_2,
            out_2=torch.stack(out_2),
            context=context,
            vector=vector,
        ),
    )

    x, t, refiner_context = draw(1, 1, 4, 16, 8), torch.tensor([[250]]), 0.1 * draw(1, 77, 48)
    refiner_pooled, refiner_sizes = draw(1, 48), torch.tensor([[1024.0, 768, 0, 0, 6.0]])
    out = refiner.predict_noise(x[0], t[0], refiner_context, refiner_pooled, refiner_sizes)
    yield (
        "refiner",
        dict(
            x_1=x,
            t_1=t,
            out_1=out[None],
            context=refiner_context,
            vector=refiner.vector(refiner_pooled, refiner_sizes),
        ),
    )

    image = torch.tanh(draw(2, 3, 48, 64))
    moments = model.vae.encode(image).latent_dist.parameters
    z = draw(2, 4, 6, 8)
    yield "vae", dict(image=image, moments=moments, z=z, decoded=model.vae.decode(z).sample)

    yield "sample", sample(model, context[1:], pooled[1:], sizes[:1], draw(1, 4, 8, 8))


def sample(model, context, pooled, sizes, noise, *, steps=20, guidance=5.0):
    """Guided sampling from sigma_max with diffusers' schedulers at Stability's spacing and initial scale."""
    contexts = torch.cat([torch.zeros_like(context), context])  # SDXL base zeroes the empty prompt
    pooleds = torch.cat([torch.zeros_like(pooled), pooled])
    vectors = model.vector(pooleds, sizes.repeat(2, 1))
    result = dict(
        noise=noise,
        guidance=guidance,
        uncond_context=contexts[:1],
        cond_context=contexts[1:],
        uncond_vector=vectors[:1],
        cond_vector=vectors[1:],
    )
    sigma_max = _sigmas()[-1]
    schedulers = {
        "euler": EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        "heun": HeunDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        "dpmpp_2m": DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing"),
    }
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(steps)
        # The last one's state has unit variance; the others' has sqrt(1 + sigma^2).
        x = noise if name == "dpmpp_2m" else noise * (1 + sigma_max**2) ** 0.5
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(torch.cat([x, x]), t)
            uncond, cond = model.predict_noise(x_in, t, contexts, pooleds, sizes.repeat(2, 1)).chunk(2)
            x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
        result[name] = x
    result["timesteps"] = schedulers["euler"].timesteps.long()
    return result


def _sigmas():
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    return ((1 - alphas) / alphas) ** 0.5


def training_inputs(draw):
    captions = [
        "a photo of a <toy>",
        "the <toy> on a table at night",
        "a small <toy>, close up",
        "my <toy> cat",
    ]
    ids_l, ids_g = tokenize(captions, 2)
    sizes = torch.tensor(
        [
            [64.0, 64, 0, 0, 64, 64],
            [96, 64, 0, 8, 64, 64],
            [4031, 3023, 0, 0, 64, 64],
            [512, 640, 5, 3, 64, 64],
        ]
    )
    timesteps = torch.tensor(np.random.RandomState(7).randint(0, 1000, (10, 4)))
    return dict(
        latents=draw(4, 4, 8, 8),
        noise=draw(10, 4, 4, 8, 8),
        timesteps=timesteps,
        ids_l=ids_l,
        ids_g=ids_g,
        sizes=sizes,
        rows_l=0.05 * draw(2, 32),
        rows_g=0.05 * draw(2, 48),
        lr=5e-3,
        weight_decay=1e-2,
    )


def train(model, data, *, max_grad_norm, micro_batch):
    """Textual inversion as diffusers' script does it, for the rows alone; returns what each update saw."""
    rows = [torch.nn.Parameter(data[name].clone()) for name in ("rows_l", "rows_g")]
    optimizer = torch.optim.AdamW(
        rows, lr=data["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=data["weight_decay"]
    )
    scheduler = DDPMScheduler(**SCHEDULE)
    losses, norms, first = [], [], None
    for noise, timesteps in zip(data["noise"], data["timesteps"], strict=True):
        optimizer.zero_grad()
        total = 0.0
        for part in torch.arange(4).split(micro_batch):
            context, pooled = model.encode_text(data["ids_l"][part], data["ids_g"][part], rows)
            noisy = scheduler.add_noise(data["latents"][part], noise[part], timesteps[part])
            predicted = model.predict_noise(noisy, timesteps[part], context, pooled, data["sizes"][part])
            loss = F.mse_loss(predicted, noise[part]) * len(part) / 4
            loss.backward()
            total += loss.item()
        first = first or [row.grad.clone() for row in rows]
        norms.append(torch.nn.utils.clip_grad_norm_(rows, max_grad_norm).item())
        optimizer.step()
        losses.append(total)
    return dict(
        losses=np.array(losses), grad_norms=np.array(norms), rows_l=rows[0], rows_g=rows[1], first=first
    )


def training(model, draw):
    data = training_inputs(draw)
    free = train(model, data, max_grad_norm=float("inf"), micro_batch=4)
    # A limit that some updates meet and others do not.
    data["max_grad_norm"] = float(np.median(free["grad_norms"]))
    data["grad_l"], data["grad_g"] = free["first"]
    yield "train", data
    for case, limit in (("free", float("inf")), ("clipped", data["max_grad_norm"])):
        whole = train(model, data, max_grad_norm=limit, micro_batch=4)
        parts = train(model, data, max_grad_norm=limit, micro_batch=1)
        names = ("losses", "grad_norms", "rows_l", "rows_g")
        for name in names:
            a, b = _array(whole[name]), _array(parts[name])
            assert np.abs(a - b).max() < 1e-4 * np.abs(a).max(), f"accumulation changes {case} {name}"
        yield f"train/{case}", {name: whole[name] for name in names}


def _array(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def compute_reference(seed=0):
    """All arrays of the module's docstring for weights and inputs drawn from `seed`."""
    torch.set_num_threads(1)  # small operators gain nothing from more, and the sums keep their order
    generator = np.random.RandomState(seed + 1000)

    def draw(*shape):
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))

    model, refiner = TinySDXL(seed), TinySDXL(seed, kind="refiner")
    arrays = {"seed": np.array(seed)}
    for group, values in (*text_and_networks(model, refiner, draw), *training(model, draw)):
        arrays.update({f"{group}/{name}": _array(value) for name, value in values.items()})
    return arrays


if __name__ == "__main__":
    np.savez_compressed(OUTPUT, **compute_reference())
