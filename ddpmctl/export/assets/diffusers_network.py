# This file is written by ddpmctl: first the parts of its source that the network needs, then the class that diffusers loads.


class ExportedNetwork(ModelMixin, ConfigMixin):
    """A network that predicts the clean image; ``labels`` are the names of its classes, ``times`` those of its sampler, from T to 0."""

    @register_to_config
    def __init__(self, net, act, width, objective, size, labels, times):
        super().__init__()
        self.network = NETWORKS.get(net)(ModelConfig(net, act, width), Task(len(labels), size))
        self.register_buffer("alpha_bar", torch.ones(times[0] + 1, dtype=torch.float64))

    def forward(self, sample, timestep, labels):
        """Map x_t (B, 3, H, W), the timestep t and multi-hot labels (B, C) to x0_hat (B, 3, H, W)."""
        bar, last = float(self.alpha_bar[int(timestep)]), len(self.alpha_bar) - 1
        time = torch.full((len(sample),), int(timestep) / last, device=sample.device, dtype=torch.float32)
        output = self.network(sample, labels, time)
        return OBJECTIVES.get(self.config.objective).prediction(output, sample, bar**0.5, (1 - bar) ** 0.5).x0
