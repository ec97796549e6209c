"""Sample images of labels: pipeline("red cube, blue sphere"); written by ddpmctl."""

import csv

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LabelPipeline(DiffusionPipeline):
    """A network with a scheduler; guidance is applied for guidance_from <= t / T <= guidance_to."""

    def __init__(self, unet, scheduler, guidance_scale=0.0, guidance_from=0.0, guidance_to=1.0):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(guidance_scale=guidance_scale, guidance_from=guidance_from, guidance_to=guidance_to)

    def multi_hot(self, labels):
        """Return texts of labels, separated by commas, as a tensor (B, C); a label with a comma stands in double quotes."""
        known = list(self.unet.config.labels)
        wanted = torch.zeros((len(labels), max(1, len(known))))
        for row, text in zip(wanted, labels):
            for name in (part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])):
                if name and name not in known:
                    raise ValueError(f"unknown label {name!r}; there are {', '.join(known) or 'none'}")
                if name:
                    row[known.index(name)] = 1
        return wanted

    @torch.no_grad()
    def __call__(self, labels="", num_inference_steps=None, guidance_scale=None, generator=None, latents=None, output_type="pil", return_dict=True):
        """Return images of ``labels``, a text or a list of texts; ``guidance_scale`` w as in eps = (1 + w) eps_c - w eps_u."""
        wanted = self.multi_hot([labels] if isinstance(labels, str) else list(labels)).to(self.unet.device, self.unet.dtype)
        times, config = list(self.unet.config.times), self.config
        last = times[0]
        if num_inference_steps is not None:
            times = [round(last * (num_inference_steps - step) / num_inference_steps) for step in range(num_inference_steps + 1)]
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        shape = (len(wanted), 3, self.unet.config.size, self.unet.config.size)
        x = randn_tensor(shape, generator=generator, device=self.unet.device, dtype=self.unet.dtype) if latents is None else latents.to(self.unet.device)
        self.scheduler.set_timesteps(timesteps=times if "DDPM" in type(self.scheduler).__name__ else times[:-1])
        keywords = {"generator": generator} if generator is not None else {}
        for t, following in self.progress_bar(list(zip(times, times[1:]))):
            x0 = self.unet(x, t, wanted)
            if scale and config.guidance_from <= t / last <= config.guidance_to:
                x0 = (1 + scale) * x0 - scale * self.unet(x, t, torch.zeros_like(wanted))
            x = self.scheduler.step(x0, t, x, **keywords).prev_sample if following else x0
        images = (x.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).float().cpu().numpy()
        made = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=made) if return_dict else (made,)
