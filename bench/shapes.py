"""The sizes of real models. Everything measured here is measured at one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A transformer: ``blocks`` of width ``heads·head_dim``, with ``text`` text tokens.

    ``modulation`` is the number of D-wide chunks that one block's modulation is cut into, so shift,
    scale and gate are views of row stride ``modulation·D``.
    """

    name: str
    blocks: int
    heads: int
    head_dim: int
    text: int
    modulation: int = 6

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SD3_MEDIUM = Model("SD3-medium", 24, 24, 64, 333)
SD35_MEDIUM = Model("SD3.5-medium", 24, 24, 64, 333, modulation=9)
SD35_LARGE = Model("SD3.5-large", 38, 38, 64, 333)
FLUX_DEV = Model("FLUX.1-dev", 57, 24, 128, 512)
MODELS = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE, FLUX_DEV)

IMAGE_TOKENS = (1024, 4096)
"""512 and 1024 pixels."""
BATCHES = (1, 4, 16)

LATENTS = ((32, 4, 32, 32), (16, 16, 128, 128), (256, 3, 32, 32), (64, 3, 256, 256))
"""Loss and step tensors: launch-bound, SD3 at 1024 px, CIFAR-10, images of 256²."""
LAUNCH_BOUND_BELOW = 1_000_000
"""Elements under which a loss tensor is launch-bound rather than memory-bound."""

LEVELS = ("tiny", "default", "full")

Tokens = tuple[int, int, int]
"""[B, S, D]."""


def token_shapes(level: str, device: str) -> list[tuple[Tokens, int]]:
    """Shapes [B, S, D] of the ops between the matrix products, each with its priority.

    Priority 0 is what the targets are stated at; a run whose time is short drops the others.
    """
    if level == "tiny":
        return [((2, 8, 48), 0)]
    shapes: list[tuple[Tokens, int]] = [
        ((4, 1024, SD3_MEDIUM.width), 0),
        ((1, 1024, SD35_LARGE.width), 2),
        ((1, 1024, FLUX_DEV.width), 2),
    ]
    if device == "cuda":
        shapes = [
            ((4, 1024, SD3_MEDIUM.width), 0),
            ((4, 4096, SD35_LARGE.width), 1),
            ((4, 4096, FLUX_DEV.width), 1),
            ((1, 1024, SD3_MEDIUM.width), 2),
            ((4, SD3_MEDIUM.text, SD3_MEDIUM.width), 2),
        ]
    if level == "full":
        listed = {shape for shape, _ in shapes}
        for model in (SD3_MEDIUM, SD35_LARGE, FLUX_DEV):
            for tokens in (*IMAGE_TOKENS, model.text):
                for batch in BATCHES:
                    shape = (batch, tokens, model.width)
                    if shape not in listed:
                        shapes.append((shape, 3))
    return shapes


def latent_shapes(level: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes [B, C, H, W] of losses and steps, each with its priority."""
    if level == "tiny":
        return [((3, 4, 8, 8), 0)]
    return [(shape, 0 if index < 2 else 2) for index, shape in enumerate(LATENTS)]


def block_parameters(width: int) -> list[tuple[int, ...]]:
    """The parameter shapes of one SD3 block: 36·D² elements, in two streams."""
    matrices = [
        (6 * width, width),  # modulation
        (3 * width, width),  # query, key, value
        (width, width),  # attention output
        (4 * width, width),  # feed-forward
        (width, 4 * width),
    ]
    stream: list[tuple[int, ...]] = []
    for matrix in matrices:
        stream += [matrix, matrix[:1]]  # and its bias
    return stream * 2


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
