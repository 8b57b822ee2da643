"""The projection of actions into the expert: Fourier features of each waypoint and of t, then a small MLP.

Source: `PerWaypointActionInProjV2` of the public Alpamayo code (behaviour and state-dict names).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fourier(nn.Module):
    """`sqrt(2) [sin(2 pi f x), cos(2 pi f x)]` over log-spaced frequencies 1 .. max_freq.

    Products are float32 whatever the model's dtype, but the frequencies are those the checkpoint's dtype can hold
    (2.78125 and not 2.7826 in bf16): with exact ones the velocity is off by 2 to 3 %.
    """

    def __init__(self, features: int, max_freq: float, *, rounded_to: torch.dtype, persistent: bool) -> None:
        super().__init__()
        freqs = torch.logspace(0, math.log10(max_freq), features // 2, dtype=torch.float32)[None]
        self.register_buffer("freqs", freqs.to(rounded_to).float(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """`[...]` to `[..., features]`, float32."""
        freqs: Tensor = self.freqs  # type: ignore[assignment]
        angle = x.float()[..., None] * freqs[0].float() * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=-1) * math.sqrt(2)


class FloatLayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in float32, as CUDA autocast does; the expert's residual stream starts here."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded back to the input's dtype before the gain."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Encoder(nn.Module):
    """MLP over one waypoint's features; RMSNorm before every Linear but the first."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        trunk: list[nn.Module] = [nn.Linear(inputs, hidden), nn.SiLU()]
        for layer in range(layers):
            trunk += [RMSNorm(hidden), nn.Linear(hidden, hidden if layer < layers - 1 else outputs), nn.SiLU()]
        self.trunk = nn.Sequential(*trunk[:-1])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.trunk(x)
        return result


class ActionInProjection(nn.Module):
    """Maps noisy actions `[..., 64, 2]` and times `[...]` to expert inputs `[..., 64, expert_hidden]` (float32)."""

    def __init__(
        self,
        outputs: int,
        *,
        hidden_size: int = 512,
        num_fourier_feats: int = 20,
        max_freq: float = 100.0,
        num_enc_layers: int = 2,
        rounded_to: torch.dtype = torch.float32,
        persistent_constants: bool = True,
    ) -> None:
        super().__init__()

        def fourier() -> Fourier:
            return Fourier(num_fourier_feats, max_freq, rounded_to=rounded_to, persistent=persistent_constants)

        self.sinus = nn.ModuleList([fourier(), fourier()])
        self.timestep_fourier_encoder = fourier()
        self.encoder = Encoder(3 * num_fourier_feats, hidden_size, outputs, num_enc_layers)
        self.norm = FloatLayerNorm(outputs)

    def forward(self, action: Tensor, t: Tensor) -> Tensor:
        parts = [encode(action[..., channel]) for channel, encode in enumerate(self.sinus)]
        times: Tensor = self.timestep_fourier_encoder(t)
        parts.append(times[..., None, :].expand(*parts[0].shape[:-1], -1))
        features = torch.cat(parts, dim=-1)
        weight: Tensor = self.encoder.trunk[0].weight  # type: ignore[assignment]
        result: Tensor = self.norm(self.encoder(features.to(weight.dtype)))
        return result
