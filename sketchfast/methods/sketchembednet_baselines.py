"""SketchEmbedNet's baselines on its own encoder, code size, drawings, batches and learning rates.

Wang, Ren, Zemel 2021 (section 4.1, "Baselines") compare with a representation learned from pixels alone
(Conv-VAE: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv 1312.6114) and with one that sees the
strokes but does not draw (Contrastive: an image and a sketch embedding matched by InfoNCE, van den Oord et
al., arXiv 1807.03748, similar to the search embedding of Ribeiro et al. 2020, "Sketchformer"). The paper
gives no sizes of the pixel decoder and the sketch encoder: those here are said where they are set.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._contract import check_integer, check_number
from .sketchembednet import Batch, SketchEncoder, SketchEncoderConfig, stroke5

# ---- Conv-VAE ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvVAEConfig(SketchEncoderConfig):
    """The paper's Conv-VAE on its QuickDraw run's data."""

    kl_weight: float = 1.0
    """weight of the divergence from the prior, 1 for the evidence lower bound; the authors' code averages
    over pixels and over z's units apart, which is a weight of pixels / latent_size, 3.06 at 28 x 28"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("kl_weight", self.kl_weight, at_least=0)


class PixelDecoder(nn.Module):
    """Codes [B, latent] to logits of pixels [B, channels, side, side]: the encoder's mirror image.

    A linear layer to a map of a sixteenth of the side, then transposed 3x3 convolutions of stride 2, each
    behind batch norm and ReLU. widths: channels of the maps before each of them, four for a sixteenth.
    """

    def __init__(self, latent: int, widths: tuple[int, ...], channels: int, side: int) -> None:
        super().__init__()
        sides = [side]
        for _ in widths:
            sides.append((sides[-1] + 1) // 2)
        sides.reverse()
        self.start = (widths[0], sides[0], sides[0])
        self.expand = nn.Linear(latent, widths[0] * sides[0] ** 2)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise((*widths, channels))):
            # without output padding a side n grows to 2 n - 1
            padding = sides[index + 1] - (2 * sides[index] - 1)
            convolution = nn.ConvTranspose2d(
                inputs,
                outputs,
                3,
                stride=2,
                padding=1,
                output_padding=padding,
                bias=index == len(widths) - 1,  # the others stand before a batch norm, which has one
            )
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), convolution]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(self.expand(z).unflatten(1, self.start))


class ConvVAE(SketchEncoder):
    """Variational autoencoder of the encoder's input: pixels in, pixels out, no strokes.

    Loss: the negative evidence lower bound under Bernoulli pixels, in nats a pixel.
    """

    Config = ConvVAEConfig
    config: ConvVAEConfig

    def __init__(self, config: ConvVAEConfig) -> None:
        super().__init__(config)
        self.decoder = PixelDecoder(
            config.latent_size, self.encoder.widths[::-1], config.image_channels, config.image_size
        )

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """-E log p(x | z) + kl_weight KL(q(z | x) || N(0, 1)), both over the number of pixels (Eq. 10)."""
        images = self.inputs(batch)
        mean, log_variance = self.encode(images)
        logits = self.decoder(self.sample_code(mean, log_variance)).float()
        mean, log_variance = mean.float(), log_variance.float()
        reconstruction = F.binary_cross_entropy_with_logits(logits, images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        divergence = divergence / images.numel()
        self.count_step(step)
        return {
            "loss": reconstruction + self.config.kl_weight * divergence,
            "reconstruction": reconstruction,
            "divergence": divergence,
        }

    @torch.no_grad()
    def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """The decoder's mean of codes z [B, latent_size]: ink [B, S, S], or RGB [B, 3, S, S] of photos.

        A mean is not drawn: temperature and seed change nothing.
        """
        self.check_codes(z)
        pictures = torch.sigmoid(self.decoder(z).float())
        return pictures if self.takes_colour else pictures[:, 0]

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int = 8) -> dict[str, Tensor]:
        """The input, and what the decoder makes of its mean code."""
        training = self.training
        self.eval()
        images = self.inputs(type(batch)(*(part[:count] for part in batch)))
        reconstruction = self.generate(self.encode(images)[0])
        self.train(training)
        return {"input": images if self.takes_colour else images[:, 0], "reconstruction": reconstruction}


# ---- Contrastive -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContrastiveConfig(SketchEncoderConfig):
    """The paper's Contrastive baseline on its QuickDraw run's data."""

    temperature: float = 0.1
    """what cosine similarities are divided by; the paper gives none"""
    symmetric: bool = True
    """the mean of finding the sketch of an image and the image of a sketch; off: the former alone"""
    sketch_hidden_size: int = 512
    """units of the sketch encoder's LSTM in each direction; the paper gives none, its decoder has 1024"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, above=0)
        check_integer("sketch_hidden_size", self.sketch_hidden_size, 1)
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be a bool, got {self.symmetric!r}")


class SketchRNN(nn.Module):
    """A bidirectional LSTM over stroke-5 rows y [B, T, 5] of `lengths` [B]; its two last states to a code.

    Padded, not packed: packing would read the lengths on the host at every step.
    """

    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(5, hidden, batch_first=True)
        self.backwards = nn.LSTM(5, hidden, batch_first=True)
        self.to_latent = nn.Linear(2 * hidden, latent)

    def forward(self, y: Tensor, lengths: Tensor) -> Tensor:
        last = (lengths - 1)[:, None]
        reverse = (last - torch.arange(y.shape[1], device=y.device)).clamp_min(0)
        reversed_y = y.gather(1, reverse[..., None].expand_as(y))
        states = [
            rnn(rows)[0].gather(1, last[..., None].expand(-1, -1, rnn.hidden_size))[:, 0]
            for rnn, rows in ((self.forwards, y), (self.backwards, reversed_y))
        ]
        return self.to_latent(torch.cat(states, dim=1))


class Contrastive(SketchEncoder):
    """Images and their sketches matched in one space by InfoNCE; the other pairs of the batch are negatives.

    The embedding of an image is the mean of its code; the log variance is not used.
    """

    Config = ContrastiveConfig
    config: ContrastiveConfig

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config)
        self.sketch_encoder = SketchRNN(config.sketch_hidden_size, config.latent_size)

    @classmethod
    def preset(cls, name: str) -> ContrastiveConfig:
        shared: ContrastiveConfig = super().preset(name)
        sizes = {"small": 128, "tiny": 16}
        return replace(shared, sketch_hidden_size=sizes.get(name, shared.sketch_hidden_size))

    def similarities(self, batch: Batch) -> Tensor:
        """Cosines [B, B] of all ranks' images (rows) with all ranks' sketches (columns)."""
        images = self.encode(self.inputs(batch))[0]
        sketches = self.sketch_encoder(stroke5(batch, self.offset_scale), batch.lengths)
        # in bfloat16 near cosines would be equal
        with torch.autocast(images.device.type, enabled=False):
            codes = F.normalize(torch.stack((images.float(), sketches.float()), dim=1), dim=2)
            rows, columns = self.gather_rows(codes).unbind(1)
            return rows @ columns.T

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """InfoNCE over the global batch (van den Oord et al., Eq. 4); share of images that find their own."""
        cosines = self.similarities(batch)
        own = torch.arange(len(cosines), device=cosines.device)
        logits = cosines / self.config.temperature
        loss = F.cross_entropy(logits, own)
        if self.config.symmetric:
            loss = 0.5 * (loss + F.cross_entropy(logits.T, own))
        self.count_step(step)
        return {"loss": loss, "matched": (cosines.argmax(dim=1) == own).float().mean()}

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int = 8) -> dict[str, Tensor]:
        """The input, its own sketch, and the sketch of the batch that lies nearest to it."""
        training = self.training
        self.eval()
        images, drawings = self.inputs(batch), self.render(batch)[:, 0]
        codes = F.normalize(
            self.sketch_encoder(stroke5(batch, self.offset_scale), batch.lengths).float(), dim=1
        )
        nearest = (self.encode(images[:count])[0].float() @ codes.T).argmax(dim=1)
        self.train(training)
        return {
            "input": images[:count] if self.takes_colour else images[:count, 0],
            "own sketch": drawings[:count],
            "nearest sketch of the batch": drawings[nearest],
        }
