"""The picture protocols of SketchEmbedNet's paper (sections 4.4 and 4.5, Figures 3 to 8), and numbers.

Each is a function of the trained network, an untrained twin and a data set, as every protocol; the networks
compared are given as further runs. What is measured and drawn is in `evaluate.probes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.dataset import StrokeDataset
from ..data.strokes import Sketch
from ..evaluate import probes
from ..ops._contract import check_integer, check_number
from .base import DataSpec, Method, Table
from .sketchembednet import (
    PHOTO_DATA,
    SketchEncoder,
    StrokeBatch,
    StrokeBatches,
    compared_networks,
    networks_facts,
    read_drawings,
    read_photos,
    split_classes,
    usable_drawings,
)

#: the compositions shown where none are given, on data that has their classes; the first is the paper's
TRIPLES = (
    "snowman - circle + square",
    "snowman - circle + triangle",
    "television - square + circle",
    "envelope - square + circle",
)
_BATCH = 512
_ANY_LENGTH = 1 << 30
_UNSEEN_INSTANCES = range(1000, 1004)
"""of the procedural data: training takes instances from 0 on"""

#: ink [N, S, S], ink = 255, or photos [N, S, S, 3]
Images = NDArray[np.uint8]


# ---- networks and images -----------------------------------------------------------------------------------


def _device(network: SketchEncoder) -> torch.device:
    return next(network.parameters()).device


def render_sketches(network: SketchEncoder, sketches: Sequence[Sketch]) -> Images:
    """Images [N, S, S], ink = 255, as the network's own training raster draws them: fitted to the canvas."""
    drawings = StrokeDataset.from_sketches(sketches, np.zeros(len(sketches), np.int64), ["sketch"])
    batches, images = StrokeBatches(drawings, int(drawings.lengths.max())), []
    for start in range(0, len(batches), _BATCH):
        batch = batches.__getitems__(list(range(start, min(start + _BATCH, len(batches)))))
        images.append(network.render(StrokeBatch(*(part.to(_device(network)) for part in batch))).cpu())
    return (torch.cat(images)[:, 0] * 255).round().to(torch.uint8).numpy()


@torch.no_grad()
def encode_images(network: SketchEncoder, images: Images) -> tuple[Tensor, Tensor]:
    """Mean and log variance, each [N, D] on the network's device, of ink or photos.

    A network of photos sees ink as a photo of it, dark on white; one of ink sees a photo's darkness.
    """
    parts = []
    for start in range(0, len(images), _BATCH):
        given = torch.from_numpy(images[start : start + _BATCH]).to(_device(network)).float() / 255
        photos = given.permute(0, 3, 1, 2) if given.dim() == 4 else 1 - given[:, None].expand(-1, 3, -1, -1)
        seen = photos if network.takes_colour else 1 - photos.mean(dim=1, keepdim=True)
        parts.append(network.encode(network.fit_images(seen)))
    means, log_variances = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(log_variances)


def embed_sketches(network: SketchEncoder, sketches: Sequence[Sketch]) -> NDArray[np.float32]:
    return _vectors(encode_images(network, render_sketches(network, sketches))[0])


def _vectors(codes: Tensor) -> NDArray[np.float32]:
    return codes.float().cpu().numpy()


@torch.no_grad()
def generate_images(network: SketchEncoder, z: Tensor, *, temperature: float, seed: int) -> Images:
    """Pictures decoded from codes [N, D]: ink, or photos where the decoder makes such."""
    pictures = network.generate(z, temperature=temperature, seed=seed).float().clamp(0, 1)
    pictures = pictures.permute(0, 2, 3, 1) if pictures.dim() == 4 else pictures
    return (pictures * 255).round().to(torch.uint8).cpu().numpy()


def _unit(images: Images) -> NDArray[np.float64]:
    """In [0, 1], as pictures are made of them."""
    return images / 255


def _evaluation_mode(networks: Mapping[str, SketchEncoder]) -> None:
    for network in networks.values():
        network.eval()


def _percent(share: float) -> float:
    return round(100 * float(share), 2)


# ---- data --------------------------------------------------------------------------------------------------


def _stroke_classes(data: DataSpec) -> StrokeDataset | None:
    """The data's drawings, where its classes may be objects: the characters of Omniglot are none."""
    return None if data.name == "omniglot" else read_drawings(data)


def _omniglot_images(root: Path, size: int, count: int, seed: int) -> Images:
    """One image each of `count` characters of Omniglot's published evaluation set [count, size, size]."""
    from ..data.omniglot import load_omniglot

    images = load_omniglot(root, split="evaluation", size=size)
    rng = np.random.default_rng(seed)
    characters = rng.permutation(len(images.class_names))[:count]
    return np.stack([images.images[rng.choice(np.flatnonzero(images.labels == c))] for c in characters])


def _omniglot_root(data: DataSpec, omniglot: Path | None) -> Path | None:
    return omniglot if omniglot is not None else data.root if data.name == "omniglot" else None


def _pick(drawings: StrokeDataset, names: list[str], config: Any, count: int, seed: int) -> StrokeDataset:
    """At most `count` usable drawings of the classes `names`, a random one of each class in turn."""
    of_names = [drawings.class_names.index(name) for name in names]
    rows = np.flatnonzero(np.isin(drawings.labels, of_names))
    # simplifying takes long: twice as many as wanted are looked at, for those that are too long
    rows = rows[spread_rows(drawings.labels[rows], 2 * count, seed)]
    usable = usable_drawings(drawings.subset(rows), names, config)
    return usable.subset(spread_rows(usable.labels, count, seed))


def _sketches(drawings: StrokeDataset) -> list[Sketch]:
    return [drawings[row][0] for row in range(len(drawings))]


def spread_rows(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """At most `count` rows in random order: one of each label before a second of any."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels[shuffled] == label] = np.arange((labels == label).sum())
    return shuffled[np.argsort(turn, kind="stable")[:count]]


# ---- arrangement and space ---------------------------------------------------------------------------------


def arrangement(
    method: Method,
    untrained: Method,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
    shapes: tuple[str, str] = ("circle", "square"),
    most: int = 4,
    examples: int = 40,
    neighbours: int = 15,
    seed: int = 0,
) -> list[Table]:
    """How embeddings tell arrangements of components apart: number, placement, containment (Figure 4).

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: its classes named as the shapes are the components, where it has them; else drawn by rule.
        conv_vae: folder of a run of conv_vae to stand beside it.
        contrastive: folder of a run of contrastive to stand beside it.
        sketchembednet: folder of a run of sketchembednet, where the run evaluated is of another method.
        shapes: the two components, classes of the data or of circle, square, triangle.
        most: the largest number of components.
        examples: scenes of each arrangement.
        neighbours: UMAP's n_neighbors; the paper does not say its own, 15 is the package's default.
        seed: of scenes and projection.
    """
    for name, value, least in (("most", most, 2), ("examples", examples, 4), ("neighbours", neighbours, 2)):
        check_integer(name, value, least)
    check_integer("seed", seed, 0)
    networks = compared_networks(
        method, untrained, conv_vae=conv_vae, contrastive=contrastive, sketchembednet=sketchembednet
    )
    _evaluation_mode(networks)
    components = probes.Components(_stroke_classes(data))
    components.check("shapes", *shapes)
    found = [
        probes.numerosity(components, shapes, most, examples, seed),
        probes.placement(components, shapes, examples, seed),
        probes.containment(components, shapes, examples, seed),
    ]
    landmarks = {name: _landmarks(components, name, examples, seed) for name in ("snowman", "television")}
    landmarks = {name: sketches for name, sketches in landmarks.items() if sketches}
    rows: list[dict[str, Any]] = []
    panels: dict[str, list[probes.Panel]] = {name: [] for name in networks}
    for probe in found:
        counts = np.bincount(probe.labels)
        shown = landmarks if probe.relation == "numerosity" else {}
        for name, network in networks.items():
            vectors = embed_sketches(network, probe.sketches)
            accuracy = probes.neighbour_accuracy(vectors, probe.labels)
            row = {
                "relation": probe.relation,
                "network": name,
                "k-NN accuracy": _percent(accuracy),
                "chance": _percent(counts.max() / counts.sum()),
                "silhouette": round(probes.silhouette(vectors, probe.labels), 3),
            }
            rows.append(row)
            further = [embed_sketches(network, sketches) for sketches in shown.values()]
            plane = probes.umap_plane(np.concatenate([vectors, *further]), neighbours=neighbours, seed=seed)
            parts = np.split(plane, np.cumsum([len(vectors), *map(len, further)])[:-1])
            caption = f"k-NN {100 * accuracy:.0f} %, silhouette {row['silhouette']:.2f}"
            panels[name].append(probes.Panel(parts[0], caption, dict(zip(shown, parts[1:], strict=True))))
    firsts = [
        [probe.sketches[int(np.argmax(probe.labels == c))] for c in range(len(probe.names))]
        for probe in found
    ]
    picture = probes.arrangement_picture(
        found,
        [_unit(render_sketches(networks[list(networks)[-1]], sketches)) for sketches in firsts],
        panels,
        title=f"Arrangement of components: UMAP of embeddings, one dot a drawing, {data.name}",
    )
    note = (
        "k-NN accuracy in percent: the arrangement by the 5 nearest embeddings, leave-one-out; silhouette "
        f"from -1 to 1; ours, the paper has the picture alone. {examples} scenes an arrangement. Components: "
        f"{components.about(*shapes)}; fitted to the canvas as training drawings are. "
        f"{networks_facts(networks)}"
    )
    return [Table(f"Arrangement of components: {data.name}", rows, note, {"UMAP of arrangements": picture})]


def _landmarks(components: probes.Components, name: str, count: int, seed: int) -> list[Sketch]:
    """Drawings of a class that is made of repeated components; none where the data has no such class."""
    rows = components.rows(name)
    if not len(rows) or components.drawings is None:
        return []
    return [components.drawings[int(row)][0] for row in np.random.default_rng(seed).permutation(rows)[:count]]


def spatial(
    method: Method,
    untrained: Method,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
    shapes: tuple[str, str] = ("circle", "square"),
    examples: int = 250,
    neighbours: int = 15,
    seed: int = 0,
) -> list[Table]:
    """How embeddings follow a continuous variable of components: distance, angle, size (Figure 5).

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: its classes named as the shapes are the components, where it has them; else drawn by rule.
        conv_vae: folder of a run of conv_vae to stand beside it.
        contrastive: folder of a run of contrastive to stand beside it.
        sketchembednet: folder of a run of sketchembednet, where the run evaluated is of another method.
        shapes: the two components, classes of the data or of circle, square, triangle.
        examples: scenes a variable, at evenly spaced values.
        neighbours: UMAP's n_neighbors; the paper does not say its own, 15 is the package's default.
        seed: of scenes, projection and folds.
    """
    for name, value, least in (("examples", examples, 10), ("neighbours", neighbours, 2)):
        check_integer(name, value, least)
    check_integer("seed", seed, 0)
    networks = compared_networks(
        method, untrained, conv_vae=conv_vae, contrastive=contrastive, sketchembednet=sketchembednet
    )
    _evaluation_mode(networks)
    components = probes.Components(_stroke_classes(data))
    components.check("shapes", *shapes)
    made = (probes.distance, probes.angle, probes.size)
    found = [probe(components, shapes, examples, seed) for probe in made]
    rows: list[dict[str, Any]] = []
    panels: dict[str, list[probes.Panel]] = {name: [] for name in networks}
    for probe in found:
        for name, network in networks.items():
            vectors = embed_sketches(network, probe.sketches)
            plane = probes.umap_plane(vectors, neighbours=neighbours, seed=seed)
            explained = probes.explained_variance(vectors, probe.values, seed=seed)
            along = probes.axis_correlation(plane, probe.values)
            rows.append(
                {
                    "variable": probe.variable,
                    "network": name,
                    "R2": round(explained, 4),
                    "UMAP axis rho": round(along, 4),
                }
            )
            panels[name].append(probes.Panel(plane, f"R² {explained:.2f}, axis ρ {along:.2f}"))
    picture = probes.spatial_picture(
        found,
        [_unit(render_sketches(networks[list(networks)[-1]], _spread(probe.sketches, 5))) for probe in found],
        panels,
        title=f"Spatial variables: UMAP of embeddings, one dot a drawing, {data.name}",
    )
    note = (
        "R2: the variable by ridge regression on the embedding, 5-fold cross-validated; UMAP axis rho: |rank "
        "correlation| of the variable with the long axis of the UMAP plane, 1 for a line along which it "
        f"grows; ours, the paper has the picture alone. {examples} scenes a variable. Components: "
        f"{components.about(*shapes)}; fitted to the canvas as training drawings are. "
        f"{networks_facts(networks)}"
    )
    return [Table(f"Spatial variables: {data.name}", rows, note, {"UMAP of spatial variables": picture})]


def _spread(sketches: Sequence[Sketch], count: int) -> list[Sketch]:
    return [sketches[i] for i in np.linspace(0, len(sketches) - 1, count).round().astype(int)]


# ---- composition -------------------------------------------------------------------------------------------


class Triple(NamedTuple):
    """The classes of `whole - less + more`."""

    whole: str
    less: str
    more: str

    def text(self) -> str:
        return f"{self.whole} - {self.less} + {self.more}"


def parse_triple(text: str) -> Triple:
    """ "snowman - circle + square" in parts; ValueError for another form."""
    match = re.fullmatch(r"\s*(\S.*?)\s+-\s+(\S.*?)\s+\+\s+(\S.*?)\s*", text)
    if match is None:
        raise ValueError(f'triples must be of the form "snowman - circle + square", got {text!r}')
    return Triple(*match.groups())


def composition(
    method: Method,
    untrained: Method,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    sketchembednet: Method | None = None,
    triples: tuple[str, ...] = (),
    examples: int = 40,
    shown: int = 3,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Table]:
    """What arithmetic on embeddings is decoded to: snowman - circle + square (Figure 6).

    Args:
        method, untrained: the trained network; the untrained one is not asked.
        data: the classes of the triples; circle, square and triangle are drawn by rule where it lacks them.
        conv_vae: folder of a run of conv_vae to stand beside it.
        sketchembednet: folder of a run of sketchembednet, where the run evaluated is of another method.
        triples: such as "snowman - circle + square"; by default those of four whose classes the data has.
        examples: compositions of each triple that are measured.
        shown: of these, how many the picture shows.
        temperature: of the decoder; 0 draws the most likely points.
        seed: of the choice of drawings, and of the decoder's samples.
    """
    for name, value in (("examples", examples), ("shown", shown)):
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    check_number("temperature", temperature, at_least=0)
    networks = _decoding(
        compared_networks(method, None, conv_vae=conv_vae, sketchembednet=sketchembednet), "composition"
    )
    # what is only embedded may be of any length
    config = replace(next(iter(networks.values())).config, max_length=_ANY_LENGTH)
    drawings = _stroke_classes(data)
    components = probes.Components(drawings)
    wanted = _known_triples(triples, components)
    samples = _class_samples(components, wanted, config, examples, seed)
    by_class = _drawings_by_class(drawings, samples, config, seed)
    judged = {name: _Classes.of(network, by_class) for name, network in networks.items()}
    rows: list[dict[str, Any]] = []
    blocks: list[list[list[Any]]] = []
    for triple in wanted:
        shown_cells: list[list[Any]] = []
        for name, network in networks.items():
            images = [render_sketches(network, samples[part]) for part in triple]
            codes = [encode_images(network, part)[0] for part in images]
            composed = codes[0] - codes[1] + codes[2]
            drawn, plain = (
                generate_images(network, z, temperature=temperature, seed=seed) for z in (composed, codes[0])
            )
            judgement = judged[name].judge(network, drawn, plain, triple)
            rows.append({"triple": triple.text(), "network": name, **judgement})
            if not shown_cells:
                whole, less, more = map(_unit, images)
                for parts in zip(whole, less, more, range(min(shown, examples)), strict=False):
                    shown_cells.append([parts[0], "-", parts[1], "+", parts[2], "="])
            for cells, picture in zip(shown_cells, _unit(drawn), strict=False):
                cells.append(picture)
        blocks.append(shown_cells)
    picture = _composition_picture(
        wanted, blocks, list(networks), f"Arithmetic on embeddings, decoded: {data.name}"
    )
    note = (
        "nearest class: the class whose mean embedding is nearest to that of the decoded drawing, by the "
        "network's own encoder, for how many percent of the examples; towards the added: in how many percent "
        "the drawing lies more to the side of the added class, against the subtracted one, than the drawing "
        "decoded without arithmetic does; ours, the paper has the picture alone. "
        f"{examples} examples a triple, temperature {temperature:g}. "
        f"{_composition_facts(components, wanted, config)} {networks_facts(networks)}"
    )
    return [
        Table(f"Composition of embeddings: {data.name}", rows, note, {"Arithmetic on embeddings": picture})
    ]


def _composition_picture(
    triples: Sequence[Triple], blocks: Sequence[list[list[Any]]], networks: Sequence[str], title: str
) -> bytes:
    """The triples' equations, two triples side by side."""
    width = len(blocks[0][0])
    sides = min(len(triples), 2)
    grid = []
    for first in range(0, len(triples), 2):
        pair = list(zip(triples, blocks, strict=True))[first : first + 2]
        for number in range(len(blocks[first])):
            cells = [cell for _, block in pair for cell in block[number]]
            cells += [None] * (sides * width - len(cells))
            names = [triple.text() for triple, _ in pair] + [""] * (sides - len(pair))
            headings = [] if number else [probes.Head(name, width) for name in names]
            grid.append(probes.GridRow(cells, headings=headings))
    heads = [probes.Head("embedded", 5), probes.Head(""), *(probes.Head(name) for name in networks)]
    gaps = [width] if sides == 2 else []
    return probes.grid_picture(grid, heads=heads * sides, title=title, side=104, gaps=gaps)


def _decoding(networks: dict[str, SketchEncoder], protocol: str) -> dict[str, SketchEncoder]:
    """Those of the networks that can generate, in evaluation mode, SketchEmbedNet first."""
    _evaluation_mode(networks)
    able = {}
    for name in sorted(networks, key=lambda name: name != "SketchEmbedNet"):
        try:
            networks[name].generate(
                torch.zeros(1, networks[name].config.latent_size, device=_device(networks[name]))
            )
        except NotImplementedError:
            continue
        able[name] = networks[name]
    if not able:
        raise ValueError(f"{protocol} needs a network that generates, got only {', '.join(networks)}")
    return able


def _known_triples(texts: Sequence[str], components: probes.Components) -> list[Triple]:
    if texts:
        triples = [parse_triple(text) for text in texts]
        for triple in triples:
            components.check("triples", *triple)
        return triples
    triples = [triple for triple in map(parse_triple, TRIPLES) if len(components.rows(triple.whole))]
    if not triples:
        raise ValueError(
            f"triples must be given for data that has none of the classes of {TRIPLES}, got none"
        )
    return triples


def _class_samples(
    components: probes.Components, triples: Sequence[Triple], config: Any, count: int, seed: int
) -> dict[str, list[Sketch]]:
    """`count` drawings of each class of the triples, drawn again in turn where there are fewer."""
    samples = {}
    for name in dict.fromkeys(part for triple in triples for part in triple):
        # by name, so that a class has the same drawings whichever others there are
        rng = np.random.default_rng([seed, *name.encode()])
        if components.drawings is not None and name in components.drawings.class_names:
            # of a simple shape those that look like it: the data's circles hold slashes, too
            own = (
                components.drawings.subset(components.rows(name))
                if name in probes.RULES
                else components.drawings
            )
            drawings = usable_drawings(own, [name], config)
            order = np.resize(rng.permutation(len(drawings)), count)
            samples[name] = [drawings[int(row)][0] for row in order]
        else:
            samples[name] = [components.draw(name, rng) for _ in range(count)]
    return samples


def _drawings_by_class(
    drawings: StrokeDataset | None,
    samples: Mapping[str, list[Sketch]],
    config: Any,
    seed: int,
    per_class: int = 20,
) -> dict[str, list[Sketch]]:
    """The samples, and some drawings of each other class of the data."""
    by_class = {name: list(sketches) for name, sketches in samples.items()}
    names = [] if drawings is None else [name for name in drawings.class_names if name not in samples]
    if drawings is not None and names:
        picked = _pick(drawings, names, config, per_class * len(names), seed)
        for row in range(len(picked)):
            sketch, label = picked[row]
            by_class.setdefault(picked.class_names[label], []).append(sketch)
    return by_class


class _Classes(NamedTuple):
    """Mean embeddings of classes in one network's space."""

    names: list[str]
    means: NDArray[np.float32]

    @classmethod
    def of(cls, network: SketchEncoder, by_class: Mapping[str, list[Sketch]]) -> _Classes:
        vectors = embed_sketches(network, [sketch for of_class in by_class.values() for sketch in of_class])
        parts = np.split(vectors, np.cumsum([len(of_class) for of_class in by_class.values()])[:-1])
        return cls(list(by_class), np.stack([part.mean(axis=0) for part in parts]))

    def judge(
        self, network: SketchEncoder, composed: Images, plain: Images, triple: Triple
    ) -> dict[str, Any]:
        """Where drawings of composed codes lie among the classes, and against those of the plain codes."""
        from scipy.spatial.distance import cdist

        to_composed, to_plain = (
            cdist(_vectors(encode_images(network, images)[0]), self.means) for images in (composed, plain)
        )
        nearest = np.bincount(to_composed.argmin(axis=1), minlength=len(self.names))
        best = int(nearest.argmax())
        less, more = self.names.index(triple.less), self.names.index(triple.more)
        moved = (to_composed[:, less] - to_composed[:, more]) > (to_plain[:, less] - to_plain[:, more])
        return {
            "nearest class": self.names[best],
            "its share": _percent(nearest[best] / nearest.sum()),
            "towards the added": _percent(float(moved.mean())),
        }


def _composition_facts(components: probes.Components, triples: Sequence[Triple], config: Any) -> str:
    """Which classes are drawn by rule, and which training did not see."""
    names = list(dict.fromkeys(part for triple in triples for part in triple))
    has = [] if components.drawings is None else components.drawings.class_names
    told = [f"Drawn by rule: {', '.join(ruled)}."] if (ruled := [n for n in names if n not in has]) else []
    if has:
        held_out = set(split_classes(has, config.held_out_classes, config.split_seed)[1])
        unseen = [name for name in names if name in held_out]
        told.append(f"Held out of training on this data: {', '.join(unseen) or 'none of the classes shown'}.")
    return " ".join(told)


# ---- generation --------------------------------------------------------------------------------------------


def drawings(
    method: Method,
    untrained: Method,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    sketchembednet: Method | None = None,
    omniglot: Path | None = None,
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.5),
    images: int = 100,
    shown: int = 10,
    seed: int = 0,
) -> list[Table]:
    """What the network draws of images of seen classes, unseen classes and unseen data (Figures 3 and 7).

    Args:
        method, untrained: the trained network; the untrained one is not asked.
        data: drawings of its training classes and of those held out; characters, if it is omniglot.
        conv_vae: folder of a run of conv_vae to stand beside it.
        sketchembednet: folder of a run of sketchembednet, where the run evaluated is of another method.
        omniglot: folder that holds omniglot, for images of its evaluation characters.
        temperatures: of the decoder; 0 draws the most likely points.
        images: of each group that are measured.
        shown: of these, how many the picture shows.
        seed: of the choice of images, and of the decoder's samples.
    """
    for name, value in (("images", images), ("shown", shown)):
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    _check_temperatures(temperatures)
    networks = _decoding(
        compared_networks(method, None, conv_vae=conv_vae, sketchembednet=sketchembednet), "drawings"
    )
    groups = _groups(data, _omniglot_root(data, omniglot), next(iter(networks.values())), images, seed)
    rows: list[dict[str, Any]] = []
    grid: list[probes.GridRow] = []
    for group, given in groups.items():
        columns = min(shown, max(map(len, groups.values())))
        drawn = {"input": given}
        for name, network in networks.items():
            means = encode_images(network, given)[0]
            for temperature in (None,) if name == "Conv-VAE" else temperatures:
                pictures = generate_images(network, means, temperature=temperature or 0.0, seed=seed)
                own = probes.own_nearest(_vectors(encode_images(network, pictures)[0]), _vectors(means))
                rows.append(
                    {
                        "images": group,
                        "network": name,
                        "temperature": None if temperature is None else float(temperature),
                        "own input nearest": _percent(own),
                        "chance": _percent(1 / len(given)),
                    }
                )
                drawn[name if temperature is None else f"{name}\ntemperature {temperature:g}"] = pictures
        headings = [probes.Head(group.capitalize(), columns)]
        for label, pictures in drawn.items():
            cells = [*_unit(pictures[:columns]), *[None] * (columns - len(pictures))]
            grid.append(probes.GridRow(cells, label, headings if label == "input" else []))
    picture = probes.grid_picture(grid, title=f"Images and what is drawn of them: {data.name}")
    note = (
        "own input nearest: for how many percent of the drawings their own input is the nearest, of the "
        f"group's {images} inputs or all there are, by the network's own embedding; ours, the paper has the "
        "picture alone. The Conv-VAE's decoder has no temperature. "
        f"{_seen_facts(data)} {networks_facts(networks)}"
    )
    return [Table(f"Drawings: {data.name}", rows, note, {"Inputs and drawings": picture})]


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not temperatures:
        raise ValueError(f"temperatures must hold a number, got {temperatures!r}")
    for value in temperatures:
        check_number("temperatures", value, at_least=0)


def _groups(
    data: DataSpec, omniglot: Path | None, network: SketchEncoder, count: int, seed: int
) -> dict[str, Images]:
    """Images [n, S, S] of at most `count` drawings of seen classes, unseen classes, and Omniglot."""
    groups = {}
    if data.name != "omniglot":
        config = network.config
        if data.name == "procedural":
            from ..data.procedural import procedural

            everything = procedural(instances=_UNSEEN_INSTANCES)
        else:
            everything = read_drawings(data)
        seen, unseen = split_classes(everything.class_names, config.held_out_classes, config.split_seed)
        for group, names in (("seen classes", seen), ("unseen classes", unseen)):
            if names:
                picked = _pick(everything, names, config, count, seed)
                groups[group] = _inputs(network, data, picked)
    if omniglot is not None:
        groups["omniglot's evaluation characters"] = _omniglot_images(
            omniglot, network.config.image_size, count, seed
        )
    return groups


def _inputs(network: SketchEncoder, data: DataSpec, drawings: StrokeDataset) -> Images:
    """What the network sees of drawings: their photos if it was trained on photos and the data has them."""
    if not network.takes_colour or data.name not in PHOTO_DATA:
        return render_sketches(network, _sketches(drawings))
    with_photo, photos = read_photos(data, drawings, network.config.image_size)
    each_once = list(dict.fromkeys(with_photo.extra["photo"].tolist()))
    return photos[each_once].transpose(0, 2, 3, 1)


def _seen_facts(data: DataSpec) -> str:
    if data.name == "procedural":
        return "Seen classes: instances that training did not see."
    if data.name == "omniglot":
        return ""
    return (
        "Seen classes: any drawings of the training classes, those trained on among them (the paper's were "
        "kept out)."
    )


def one_shot(
    method: Method,
    untrained: Method,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    sketchembednet: Method | None = None,
    omniglot: Path | None = None,
    characters: int = 100,
    shown: int = 10,
    samples: int = 5,
    temperature: float = 0.3,
    seed: int = 0,
) -> list[Table]:
    """Samples of Omniglot characters of which one image is seen (Figure 8).

    Args:
        method, untrained: the trained network, not on Omniglot in the paper; the untrained one is not asked.
        data: omniglot, or, with --omniglot, any.
        conv_vae: folder of a run of conv_vae to stand beside it.
        sketchembednet: folder of a run of sketchembednet, where the run evaluated is of another method.
        omniglot: folder that holds omniglot; its published evaluation characters are drawn.
        characters: characters that are measured, an image of each.
        shown: of these, how many the picture shows.
        samples: drawings of each.
        temperature: of the decoder, where it is what is sampled; with a sampled code it draws the most likely
            points.
        seed: of the choice of images, codes and points.
    """
    for name, value, least in (("characters", characters, 2), ("shown", shown, 1), ("samples", samples, 1)):
        check_integer(name, value, least)
    check_integer("seed", seed, 0)
    check_number("temperature", temperature, at_least=0)
    root = _omniglot_root(data, omniglot)
    if root is None:
        raise ValueError("omniglot must be the folder that holds omniglot, got None")
    networks = _decoding(
        compared_networks(method, None, conv_vae=conv_vae, sketchembednet=sketchembednet), "one_shot"
    )
    support = _omniglot_images(root, next(iter(networks.values())).config.image_size, characters, seed)
    rows: list[dict[str, Any]] = []
    heads, gaps = [probes.Head("support")], []
    columns: list[Images] = []
    for name, network in networks.items():
        mean, log_variance = encode_images(network, support)
        ways: dict[str, Callable[[int], Images]] = {
            "code sampled": _code_sampler(network, mean, log_variance, seed)
        }
        if name != "Conv-VAE":
            ways[f"decoder at {temperature:g}"] = _point_sampler(network, mean, temperature, seed)
        for way, sample in ways.items():
            drawn = [sample(number) for number in range(samples)]
            own = [
                probes.own_nearest(_vectors(encode_images(network, images)[0]), _vectors(mean))
                for images in drawn
            ]
            rows.append(
                {
                    "network": name,
                    "sampled": way,
                    "own support nearest": _percent(float(np.mean(own))),
                    "chance": _percent(1 / len(support)),
                    "pixel deviation": round(float((np.stack(drawn) / 255).std(axis=0).mean()), 4),
                }
            )
            gaps.append(1 + len(columns))
            heads.append(probes.Head(f"{name}, {way}", samples))
            columns += drawn
    grid = [
        probes.GridRow([support[row] / 255, *(images[row] / 255 for images in columns)])
        for row in range(min(shown, len(support)))
    ]
    picture = probes.grid_picture(
        grid,
        title="One-shot generation of Omniglot's evaluation characters",
        heads=heads,
        side=72,
        gaps=gaps,
    )
    note = (
        f"own support nearest: for how many percent of the samples, of {len(support)} support images, that "
        "of their character is the nearest by the network's own embedding; pixel deviation: between samples "
        f"of a character, mean over pixels in [0, 1]; ours, the paper has the picture alone. {samples} "
        "samples a character, of codes z ~ N(mean, deviation) with the most likely points, or of points from "
        "z = mean. "
        f"{_trained_on(networks)} {networks_facts(networks)}"
    )
    return [Table("One-shot generation: omniglot", rows, note, {"Support images and samples": picture})]


def _trained_on(networks: Mapping[str, SketchEncoder]) -> str:
    """What the networks were trained on, and what that means for Omniglot's evaluation characters."""
    told = [
        f"{name}: trained on {getattr(network, 'trained_on', None) or 'data not recorded'}."
        for name, network in networks.items()
    ]
    return " ".join(
        [
            *told,
            "Omniglot's strokes are given out for background characters alone: none of the characters here "
            "can have been trained on. The paper's network saw no Omniglot.",
        ]
    )


def _code_sampler(
    network: SketchEncoder, mean: Tensor, log_variance: Tensor, seed: int
) -> Callable[[int], Images]:
    def sample(number: int) -> Images:
        rng = np.random.default_rng([seed, number])  # the same codes on every device
        noise = torch.from_numpy(rng.standard_normal(mean.shape)).to(mean)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return generate_images(network, z, temperature=0.0, seed=seed)

    return sample


def _point_sampler(
    network: SketchEncoder, mean: Tensor, temperature: float, seed: int
) -> Callable[[int], Images]:
    def sample(number: int) -> Images:
        return generate_images(network, mean, temperature=temperature, seed=seed + number)

    return sample


#: protocol name -> function; the table of protocols takes them in
FIGURE_PROTOCOLS: dict[str, Callable[..., list[Table]]] = {
    "drawings": drawings,
    "composition": composition,
    "arrangement": arrangement,
    "spatial": spatial,
    "one_shot": one_shot,
}

SketchEncoder.protocols = {**SketchEncoder.protocols, **FIGURE_PROTOCOLS}
