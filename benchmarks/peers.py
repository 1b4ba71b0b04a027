"""The peers, by their public interfaces: as they ship, and at their best. Each function is a contender (see workers).

diffusers: `UNet2DModel` with the recipe of its example of unconditional training: accelerate, AdamW at 1e-4, a cosine
schedule after 500 steps of warm-up, clipping at 1, `EMAModel` with its warm-up. denoising-diffusion-pytorch: its
`Unet`, `GaussianDiffusion` and `Trainer` with their defaults.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.workers import Send, repeat, trainings

NEVER = 10**9


def paper(channels: int) -> dict[str, Any]:
    """UNet2DModel's settings for the network of Ho et al. 2020, which has 128 channels."""
    return {
        "sample_size": 32,
        "block_out_channels": (channels, 2 * channels, 2 * channels, 2 * channels),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    }


def _fastest() -> None:
    """What a person would set for speed."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


class _Recipe:
    """The example of diffusers. Best: channels_last, fused AdamW, EMA in one call, no loss read back at each step."""

    def __init__(
        self,
        network: dict[str, Any],
        steps: int,
        best: bool = False,
        precision: str = "fp32",
        compiled: bool = False,
        rate: float = 1e-4,
        warmup: int = 500,
    ) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        if best:
            _fastest()
        self.best = best
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
        self.accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision))
        model: Any = UNet2DModel(**network)
        self.parameters = sum(x.numel() for x in model.parameters())
        if best:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=best or None
        )
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.weights = list(self.model.parameters())
        self.ema = EMAModel(self.weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1, power=0.75, foreach=best)
        self.ema.to(self.accelerator.device)
        self.network = torch.compile(self.model) if compiled else self.model

    def step(self, clean: Tensor) -> None:
        """One step on images (B, C, H, W) in [-1, 1]."""
        if self.best:
            clean = clean.contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        output = self.network(self.scheduler.add_noise(clean, noise, t), t).sample
        loss = F.mse_loss(output.float(), noise.float())
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.weights)
        if not self.best:
            loss.detach().item()  # for the progress bar


def diffusers_training(
    send: Send, channels: int, batch: int, steps: int, best: bool, precision: str, compiled: bool
) -> None:
    """Turns of so many training steps of the paper's network."""
    recipe = _Recipe(paper(channels), NEVER, best, precision, compiled)
    clean = torch.rand(batch, 3, 32, 32, device=recipe.accelerator.device) * 2 - 1
    repeat(send, lambda: recipe.step(clean), steps, parameters=recipe.parameters)


def _epochs(images: np.ndarray, batch: int) -> Iterator[Tensor]:
    """Shuffled batches without end, in [0, 1]; photographs (3 channels) are mirrored at random, as both recipes do."""
    while True:
        for rows in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            clean = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
            mirrored = (torch.rand(len(rows)) < 0.5) & (images.shape[3] == 3)
            yield torch.where(mirrored[:, None, None, None], clean.flip(3), clean)


def _trainer(folder: str, images: np.ndarray, batch: int, unet: dict[str, Any], **more: Any) -> Any:
    """Its trainer, fed from memory. It wants a folder of images, and is given one that it never reads."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    size = images.shape[1]
    for i in range(100):  # fewer it refuses
        Image.new("L", (size, size)).save(Path(folder, f"{i}.png"))
    diffusion = GaussianDiffusion(Unet(**unet), image_size=size, sampling_timesteps=50)
    quiet = {"save_and_sample_every": NEVER, "calculate_fid": False, "results_folder": folder}
    trainer = Trainer(diffusion, folder, train_num_steps=0, **quiet, **more)
    trainer.dl = _epochs(images, batch)
    return trainer


def _continue(trainer: Any, steps: int) -> None:
    trainer.train_num_steps += steps
    trainer.train()


def ddpm_pytorch_training(send: Send, channels: int, batch: int, steps: int, amp: bool) -> None:
    """Turns of so many training steps with the channels of the paper's network."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(
            folder,
            np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8),
            batch,
            {"dim": channels, "dim_mults": (1, 2, 2, 2)},
            amp=amp,
            mixed_precision_type="bf16",  # its default, fp16, is for GPUs alone
        )
        parameters = sum(x.numel() for x in trainer.model.model.parameters())
        repeat(send, lambda: _continue(trainer, 1), steps, parameters=parameters)


def diffusers_sampling(send: Send, folder: str, batch: int, steps: int, out: str, best: bool) -> None:
    """Turns of one batch by its DDIM pipeline; `out` receives it as float32 (batch, H, W, C) in [0, 1]."""
    from diffusers import DDIMPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DDIMPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if best:
        _fastest()
        pipeline.unet.to(memory_format=torch.channels_last)

    def draw() -> None:
        generator = torch.Generator().manual_seed(0)
        # (the clipped prediction gives epsilon, too, as in our sampler; the cost is nothing beside the network's)
        options = {"use_clipped_model_output": True, "num_inference_steps": steps, "output_type": "np"}
        np.save(out, pipeline(batch, generator, **options).images)

    repeat(send, draw, 1)


def _parts(count: int, images: str) -> list[int]:
    """How many samples to draw at a time, of the size of the images in a file: larger parts take longer per image."""
    most = 25 * 32**2 // np.load(images, mmap_mode="r")[0, ..., 0].size
    return [min(most, count - start) for start in range(0, count, most)]


def diffusers_quality(
    send: Send, images: str, count: int, seed: int, out: str, network: dict[str, Any], rate: float
) -> None:
    """Turns of a whole training by its recipe, with a tenth of the steps to warm up; see `trainings`."""
    from diffusers import DDIMPipeline

    def train(steps: int) -> _Recipe:
        torch.manual_seed(seed)
        recipe = _Recipe(network, steps, rate=rate, warmup=steps // 10)
        stream = _epochs(np.load(images, mmap_mode="r"), 16)
        for _ in range(steps):
            recipe.step(next(stream).to(recipe.accelerator.device) * 2 - 1)
        return recipe

    def samples(recipe: _Recipe) -> np.ndarray:
        recipe.ema.copy_to(recipe.weights)
        pipeline: Any = DDIMPipeline(recipe.model.eval().to(memory_format=torch.channels_last), recipe.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 50, "output_type": "np"}
        parts = [pipeline(part, generator, **options).images for part in _parts(count, images)]
        return (np.concatenate(parts) * 255).round().astype(np.uint8)

    trainings(send, train, samples, out)


def ddpm_pytorch_quality(
    send: Send, images: str, count: int, seed: int, out: str, network: dict[str, Any], rate: float
) -> None:
    """Turns of a whole training by its trainer; see `trainings`."""

    def train(steps: int) -> Any:
        torch.manual_seed(seed)
        trainer = _trainer(folder, np.load(images, mmap_mode="r"), 16, network, train_lr=rate)
        _continue(trainer, steps)
        return trainer

    def samples(trainer: Any) -> np.ndarray:
        torch.manual_seed(seed)
        model = trainer.ema.ema_model.eval()
        drawn = torch.cat([model.sample(batch_size=part) for part in _parts(count, images)])
        return (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    with tempfile.TemporaryDirectory() as folder:
        trainings(send, train, samples, out)
