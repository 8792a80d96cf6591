"""Category-level sketch-based image retrieval: photos ranked by cosine similarity, scores and pictures."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageFont

T = TypeVar("T")

#: what the similarities under way at one time may take, in bytes
MEMORY_BUDGET = 256 * 2**20


class RetrievalScores(NamedTuple):
    """Means over the queries, as fractions in [0, 1]; see `retrieval_scores`."""

    precision_at: float
    """Prec@n"""
    map_at: float
    """mAP@n"""
    map_all: float
    """mAP over the whole gallery"""
    top: int
    """n: the `top` asked for, or the gallery's size where that is less"""
    queries: int
    gallery: int


# --------------------------------------------------------------------------------------------------
# Ranking


def retrieval_scores(
    query: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    top: int = 200,
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> RetrievalScores:
    """Prec@n, mAP@n and mAP of sketches that retrieve photos (PM-JDOT section 4.1, n = 200).

    For each query the gallery is ranked by decreasing cosine similarity (see `nearest`; of equal ones the
    lower index comes first), and a gallery item is relevant where it has the query's label. With rel(r) = 1
    where rank r holds a relevant item, precision@r = (rel(1) + ... + rel(r)) / r, and n = min(top, G):

        Prec@n = precision@n
        mAP@n  = sum_{r <= n} rel(r) precision@r / sum_{r <= n} rel(r), and 0 where none of the first n is
                 relevant
        mAP    = the same over all G ranks: the divisor is every relevant item. A query whose label no gallery
                 item has counts 0 in all three.

    Each is averaged over the queries. mAP@n divides by the relevant items *among the first n*, as the public
    zero-shot SBIR code does: `apsak` in src/utils.py of AnjanDutta/sem-pcyc (Dutta & Akata 2019) gives
    scikit-learn's average_precision_score the first n alone, and so do lines left commented out in
    src/test.py of sounakdey/doodle2search (Dey et al. 2019), whose live code has mAP alone. Figures made
    otherwise do not compare: `eval_AP_inner`, found in many public SBIR repositories and called by the test
    script of qliu24/SAKE (Liu et al. 2019), divides by min(n, relevant in the gallery) and interpolates the
    precision; doodle2search's commented-out Prec@200 is the relevance of rank 201 alone; and all three rank
    by Euclidean distance.

    Args:
        query, gallery: [Q, D] and [G, D] vectors of any length, any floating dtype, array or tensor.
        query_labels, gallery_labels: [Q] and [G], any integer dtype.
        top: n, at least 1.
        chunk: queries a thread ranks at a time; None keeps the similarities of all threads within 256 MB. No
            score depends on it, to the last bit.
        device: where to rank, CPU or CUDA; None is where `query` is. The ranking is the same on both.

    Raises TypeError or ValueError that names the argument: dtypes, shapes, empty or non-finite vectors. No
    gradients.

    On CPU the cost is the product and one sort of 64-bit keys a query; torch.get_num_threads() threads share
    the queries. A sort is the cheap way to all ranks where NumPy has its vector sort (AVX2, AVX-512): placing
    the gallery among a few hundred sorted relevant similarities costs several times as much.
    """
    top = _count("top", top)
    query_rows, gallery_rows = _unit_vectors(query, gallery)
    labels = _labels("query_labels", query_labels, len(query_rows))
    classes = _labels("gallery_labels", gallery_labels, len(gallery_rows))
    top, where = min(top, len(gallery_rows)), _device_of(query, device)
    size = _chunk_size(chunk, len(gallery_rows), where)

    def scores(rows: slice) -> list[tuple[float, float, float]]:
        chunks = _ranking_keys(query_rows[rows], gallery_rows, size, where, (labels[rows], classes))
        return [_scores_of(ranks, top) for keys in chunks for ranks in _relevant_ranks(keys)]

    scored = np.concatenate(_shared_out(scores, len(query_rows), where))
    precision_at, map_at, map_all = scored.mean(axis=0)
    return RetrievalScores(
        float(precision_at), float(map_at), float(map_all), top, len(query_rows), len(gallery_rows)
    )


def nearest(
    query: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor,
    k: int,
    *,
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k gallery vectors most similar to each query: (similarity [Q, k] float32, index [Q, k] int64).

    Cosine similarity, best first; of equal ones the lowest index comes first. A zero vector has similarity 0
    to everything. Vectors are scaled to length 1 in float64 and rounded to float32 and to multiples of 2^-26:
    a product is then a multiple of 2^-52 and no sum of them reaches 2, so float64 holds every partial sum
    exactly, and the similarity, rounded once to float32, depends on nothing but the two vectors: not on
    chunking, threads or device. Equal gallery rows tie exactly. The rounding of the vectors moves a
    similarity by about 1e-8, less than its own.

    Args:
        query, gallery: [Q, D] and [G, D] vectors, any floating dtype, array or tensor.
        k: 1 to G.
        chunk, device: see `retrieval_scores`; the result is on the CPU.

    Raises TypeError or ValueError that names the argument. No gradients.
    """
    k = _count("k", k)
    query_rows, gallery_rows = _unit_vectors(query, gallery)
    if k > len(gallery_rows):
        raise ValueError(f"k must be at most the {len(gallery_rows)} gallery vectors, got {k}")
    where = _device_of(query, device)
    size = _chunk_size(chunk, len(gallery_rows), where)

    def best(rows: slice) -> Tensor:
        chunks = _ranking_keys(query_rows[rows], gallery_rows, size, where)
        return torch.cat([keys.topk(k, dim=1, largest=False).values.cpu() for keys in chunks])

    return _unpack(torch.cat(_shared_out(best, len(query_rows), where)))


def _shared_out(work: Callable[[slice], T], count: int, device: torch.device) -> list[T]:
    """work(rows) for consecutive shares of `count` rows: on CPU one a thread, else a single one.

    Each thread runs its products alone. Were all to share every small product, they would wait for each
    other: on a machine that others use too, that is several times slower than one thread.
    """
    if device.type != "cpu":
        return [work(slice(0, count))]
    threads = torch.get_num_threads()
    bounds = np.linspace(0, count, min(threads, count) + 1).astype(int)
    shares = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
    try:
        with ThreadPoolExecutor(len(shares), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, shares))
    finally:
        torch.set_num_threads(threads)


def _ranking_keys(
    query: Tensor,
    gallery: Tensor,
    chunk: int,
    device: torch.device,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Tensor]:
    """For each chunk of queries, int64 keys [chunk, G] that sort ascending into the ranking (see `_pack`).

    All chunks share one buffer: a chunk's keys hold until the next is asked for.
    """
    size = len(gallery)
    chunk = min(chunk, len(query))
    width = min(size, max(256, 2**18 // chunk))  # a tile of similarities stays in the cache of a core
    gallery = gallery.to(device)
    positions = torch.arange(size, device=device) << 1
    classes = None if labels is None else labels[1].to(device)
    buffer = torch.empty((chunk, size), dtype=torch.int64, device=device)
    for start in range(0, len(query), chunk):
        rows = query[start : start + chunk].to(device).double()
        wanted = None if labels is None else labels[0][start : start + chunk, None].to(device)
        keys = buffer[: len(rows)]
        for left in range(0, size, width):
            tile = slice(left, min(left + width, size))
            similarity = (rows @ gallery[tile].double().T).float()
            _pack(similarity, positions[tile], keys[:, tile])
            if wanted is not None and classes is not None:
                keys[:, tile] |= classes[tile] == wanted
        yield keys


def _pack(similarity: Tensor, position: Tensor, out: Tensor) -> None:
    """Keys: negated similarity in the upper 32 bits, then the index, then a bit free for relevance.

    No two keys are equal, so any sort, stable or not, gives the one ranking.
    """
    bits = (0.0 - similarity).view(torch.int32)  # 0 - x: a zero of either sign becomes +0, which ties
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the order of floats as that of integers
    out.copy_(bits)
    out <<= 32
    out |= position


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity and index of keys."""
    bits = (keys >> 32).int()
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return 0.0 - bits.view(torch.float32), (keys & 0xFFFFFFFF) >> 1


def _relevant_ranks(keys: Tensor) -> list[NDArray[np.int64]]:
    """For each row of keys the ranks of its relevant items, ascending, the best rank being 1. Sorts keys."""
    if keys.device.type == "cpu":
        rows = keys.numpy()  # NumPy sorts integers several times faster than torch, and without the GIL
        rows.sort(axis=1)
        return [np.flatnonzero(row & 1) + 1 for row in rows]
    row, column = (keys.sort(dim=1).values & 1).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(keys)).cpu().numpy()
    return np.split(column.cpu().numpy() + 1, np.cumsum(counts)[:-1])


def _scores_of(ranks: NDArray[np.int64], top: int) -> tuple[float, float, float]:
    """Prec@top, AP@top and AP of one query, from the ranks of its relevant items."""
    if len(ranks) == 0:
        return 0.0, 0.0, 0.0
    precision = np.arange(1, len(ranks) + 1) / ranks
    among_top = int(np.searchsorted(ranks, top, side="right"))
    average_at = precision[:among_top].mean() if among_top else 0.0
    return among_top / top, float(average_at), float(precision.mean())


def _chunk_size(chunk: int | None, gallery: int, device: torch.device) -> int:
    """`chunk`, or the queries whose keys, and what sorting them takes, fit a thread's part of the budget."""
    if chunk is not None:
        return _count("chunk", chunk)
    if device.type == "cpu":
        threads, bytes_per_pair = torch.get_num_threads(), 8
    else:
        threads, bytes_per_pair = 1, 40  # keys, sorted keys, indices, work space
    return max(1, MEMORY_BUDGET // threads // (bytes_per_pair * gallery + 2**16))


def _unit_vectors(query: ArrayLike | Tensor, gallery: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 unit rows on the CPU, multiples of 2^-26 (see `nearest`)."""
    rows, others = _floating_rows("query", query), _floating_rows("gallery", gallery)
    if rows.shape[1] != others.shape[1]:
        raise ValueError(
            f"gallery must have the {rows.shape[1]} columns of query, got shape {tuple(others.shape)}"
        )
    return _unit_rows("query", rows), _unit_rows("gallery", others)


def _floating_rows(name: str, value: ArrayLike | Tensor) -> NDArray[Any] | Tensor:
    rows = value.detach() if isinstance(value, Tensor) else np.asarray(value)
    is_floating = rows.is_floating_point() if isinstance(rows, Tensor) else rows.dtype.kind == "f"
    if not is_floating:
        raise TypeError(f"{name} must have a floating dtype, got {rows.dtype}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name} must have shape [N, D], N and D at least 1, got {tuple(rows.shape)}")
    return rows


def _unit_rows(name: str, rows: NDArray[Any] | Tensor, block: int = 4096) -> Tensor:
    out = np.empty(tuple(rows.shape), dtype=np.float32)
    for start in range(0, len(rows), block):
        part: Any = rows[start : start + block]
        values = part.cpu().double().numpy() if isinstance(part, Tensor) else part.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        largest = np.abs(values).max(axis=1, keepdims=True)
        values = values / np.where(largest > 0, largest, 1)  # so that no square over- or underflows
        length = np.sqrt(np.einsum("nd,nd->n", values, values))[:, None]
        unit = (values / np.where(length > 0, length, 1)).astype(np.float32)
        out[start : start + block] = np.rint(unit * np.float32(2**26)) * np.float32(2**-26)
    return torch.from_numpy(out)


def _labels(name: str, value: ArrayLike | Tensor, count: int) -> Tensor:
    """The labels as int64 [count]."""
    labels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name} must have an integer dtype, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}], one label a vector, got {tuple(labels.shape)}")
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit int64, got {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def _count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _device_of(query: ArrayLike | Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return query.device if isinstance(query, Tensor) else torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Pictures

INK, MUTED = (34, 34, 34), (112, 112, 112)
GREEN, RED = (0, 128, 75), (204, 36, 41)


def retrieval_picture(
    query_images: ArrayLike | Tensor,
    gallery_images: ArrayLike | Tensor,
    index: ArrayLike | Tensor,
    right: ArrayLike | Tensor,
    *,
    title: str | None = None,
    query_names: Sequence[str] | None = None,
    gallery_names: Sequence[str] | None = None,
    match: ArrayLike | Tensor | None = None,
    side: int = 112,
) -> bytes:
    """A PNG with a row a query: its sketch, then its k nearest photos, as PM-JDOT's Figure 4.

    Right photos are framed green and bear a tick, wrong ones are framed red and bear a cross. The picture is
    sized by its contents; a title too long for its width is wrapped.

    Args:
        query_images: [Q, H, W, 3] uint8 RGB.
        gallery_images: [G, H', W', 3] uint8 RGB; only the images in `index` are read, a memmap will do.
        index: [Q, k] integers, the photos of each query, best first (see `nearest`).
        right: [Q, k] bool, whether a photo is of the query's class.
        query_names, gallery_names: Q and G class names, written under the images.
        match: [Q] integers, the photo each query was drawn after: shown beside it.
        side: pixels of a cell, at least 32; images are scaled to fit it, their shape kept.

    Raises TypeError or ValueError that names the argument.
    """
    from PIL import Image, ImageDraw

    queries, photos = _images("query_images", query_images), _images("gallery_images", gallery_images)
    order, correct = _ranked("index", index, "iu"), _ranked("right", right, "b")
    side = _count("side", side, least=32)
    if len(order) != len(queries):
        raise ValueError(
            f"index must have a row for each of the {len(queries)} query_images, got {order.shape}"
        )
    if correct.shape != order.shape:
        raise ValueError(f"right must have the shape of index, {order.shape}, got {correct.shape}")
    if order.min() < 0 or order.max() >= len(photos):
        raise ValueError(f"index must lie in 0..{len(photos) - 1}, got {order.min()}..{order.max()}")
    _check_names("query_names", query_names, len(queries))
    _check_names("gallery_names", gallery_names, len(photos))

    matches = None if match is None else _matching(match, len(queries), len(photos))

    gap, margin = 10, 16
    row_height = side + gap + (18 if query_names is not None or gallery_names is not None else 0)
    heads = ["query"] if matches is None else ["query", "its photo"]
    firsts = [margin + number * (side + gap) for number in range(len(heads))]
    photos_left = firsts[-1] + side + 3 * gap  # what was given stands apart from what was found
    lefts = [*firsts, *(photos_left + rank * (side + gap) for rank in range(order.shape[1]))]
    width = lefts[-1] + side + margin
    lines = _wrapped(title, _font(20), width - 2 * margin) if title else []
    head_top = margin + 27 * len(lines) + (6 if lines else 0)
    rows_top = head_top + 24
    picture = Image.new("RGB", (width, rows_top + len(queries) * row_height - gap + margin), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((margin, margin + 27 * number), line, fill=INK, font=_font(20))
    heads += [str(rank + 1) for rank in range(order.shape[1])]
    for head, left in zip(heads, lefts, strict=True):
        draw.text((left + side / 2, head_top + 16), head, fill=MUTED, font=_font(14), anchor="ms")

    def show(pixels: NDArray[np.uint8], name: str | None, mark: bool | None, left: int, top: int) -> None:
        picture.paste(_cell(pixels, side, mark), (left, top))
        if name:
            caption = _shortened(name, _font(13), side)
            draw.text((left + side / 2, top + side + 15), caption, fill=INK, font=_font(13), anchor="ms")

    for query in range(len(queries)):
        top = rows_top + query * row_height
        show(queries[query], None if query_names is None else query_names[query], None, margin, top)
        shown: list[tuple[Any, bool | None]] = [
            (item, bool(mark)) for item, mark in zip(order[query], correct[query], strict=True)
        ]
        if matches is not None:
            shown.insert(0, (matches[query], None))
        for left, (item, mark) in zip(lefts[1:], shown, strict=True):
            show(photos[item], None if gallery_names is None else gallery_names[item], mark, left, top)
    return _png(picture)


def _cell(pixels: NDArray[np.uint8], side: int, right: bool | None) -> Image.Image:
    """The image on a white square; framed and marked unless `right` is None."""
    from PIL import Image, ImageDraw

    oversampling = 4  # Pillow draws without anti-aliasing
    frame = max(2, side // 28)
    image = Image.fromarray(pixels)
    inner = side - 2 * frame
    scale = inner / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    draw = ImageDraw.Draw(cell)
    if right is None:
        draw.rectangle((0, 0, side - 1, side - 1), outline=(200, 200, 200))
        return cell
    colour = GREEN if right else RED
    draw.rectangle((0, 0, side - 1, side - 1), outline=colour, width=frame)
    badge = max(8, side // 5)
    corner = (side - badge, side - badge)
    draw.rectangle((*corner, side - 1, side - 1), fill=colour)
    mark = Image.new("L", (badge * oversampling, badge * oversampling), 0)
    strokes = (
        [[(0.22, 0.52), (0.43, 0.73), (0.8, 0.27)]]
        if right
        else [[(0.26, 0.26), (0.74, 0.74)], [(0.26, 0.74), (0.74, 0.26)]]
    )
    for stroke in strokes:
        path = [(x * mark.width, y * mark.height) for x, y in stroke]
        ImageDraw.Draw(mark).line(path, fill=255, width=mark.width // 8, joint="curve")
    cell.paste((255, 255, 255), corner, mark.resize((badge, badge), Image.Resampling.LANCZOS))
    return cell


def tsne_picture(
    sketch_vectors: ArrayLike | Tensor,
    photo_vectors: ArrayLike | Tensor,
    sketch_labels: ArrayLike | Tensor,
    photo_labels: ArrayLike | Tensor,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    most: int = 1000,
    title: str | None = None,
) -> bytes:
    """A PNG of one t-SNE embedding of both domains: sketches left, photos right, on the same axes.

    As PM-JDOT's Figure 5: where the domains are aligned, a class lies at one place in both panels. The
    vectors are scaled to length 1, so that neighbours are those of the cosine. A class keeps its colour and
    marker in both panels; the colours are told apart by the colour-blind, and no two of 63 classes look the
    same (a dozen are legible).

    Args:
        sketch_vectors, photo_vectors: [N, D] and [M, D], any floating dtype, D at least 2.
        sketch_labels, photo_labels: [N] and [M], any integer dtype, into class_names.
        seed: of the choice of points and of t-SNE; the same seed gives the same picture on one machine.
        most: points shown of each domain, taken from its classes as evenly as their sizes allow; the
            default's 2000 in all take some 6 s, on one thread.
        title: a line above the panels.

    Raises TypeError or ValueError that names the argument.
    """
    from matplotlib.figure import Figure

    most = _count("most", most)
    rows = [_floating_rows("sketch_vectors", sketch_vectors), _floating_rows("photo_vectors", photo_vectors)]
    if rows[0].shape[1] != rows[1].shape[1] or rows[0].shape[1] < 2:
        raise ValueError(
            "photo_vectors must have the columns of sketch_vectors, 2 or more, "
            f"got shapes {tuple(rows[1].shape)} and {tuple(rows[0].shape)}"
        )
    vectors = [
        _unit_rows(name, values).numpy()
        for name, values in zip(("sketch_vectors", "photo_vectors"), rows, strict=True)
    ]
    labels = [
        _class_labels("sketch_labels", sketch_labels, len(vectors[0]), len(class_names)),
        _class_labels("photo_labels", photo_labels, len(vectors[1]), len(class_names)),
    ]
    chosen = [_evenly_by_class(values, most, seed) for values in labels]
    vectors = [values[kept] for values, kept in zip(vectors, chosen, strict=True)]
    labels = [values[kept] for values, kept in zip(labels, chosen, strict=True)]
    if len(vectors[0]) + len(vectors[1]) < 4:
        raise ValueError("sketch_vectors and photo_vectors must be 4 or more together")
    places = np.split(_tsne(np.concatenate(vectors), seed), [len(vectors[0])])

    shown = np.union1d(*labels)
    columns = -(-len(shown) // 20)
    figure = Figure(figsize=(9.6 + 1.5 * columns, 5.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, name, place, classes in zip(panels, ("Sketches", "Photos"), places, labels, strict=True):
        size = 26 if len(place) <= 1500 else 12
        for label in shown:
            points = place[classes == label]
            panel.scatter(*points.T, s=size, alpha=0.8, linewidths=0.3, edgecolors="white", **_look(label))
        panel.set_title(name, fontsize=13)
        panel.set(xticks=[], yticks=[])
        panel.set_box_aspect(1)
    handles = [
        panels[0].scatter([], [], s=44, label=_shortened_to(class_names[label], 24), **_look(label))
        for label in shown
    ]
    figure.legend(handles=handles, loc="outside right center", ncols=columns, fontsize=11, frameon=False)
    if title:
        figure.suptitle(title, fontsize=14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


#: Paul Tol's "muted" scheme, made to be told apart by the colour-blind
_COLOURS = ["#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"]
_MARKERS = ["o", "^", "s", "D", "v", "P", "X"]


def _look(label: int) -> dict[str, str]:
    """Colour and marker of a class; their numbers share no divisor, so all pairs occur."""
    return {"color": _COLOURS[label % len(_COLOURS)], "marker": _MARKERS[label % len(_MARKERS)]}


def _tsne(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    collapsed = bool((vectors == vectors[0]).all())  # no principal axis to start from
    model = TSNE(
        n_components=2,
        init="random" if collapsed else "pca",
        learning_rate="auto",
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        random_state=seed,
    )
    # its threads meet at every one of many short steps: on a busy machine ten times slower than one
    with threadpool_limits(1):
        return model.fit_transform(vectors)


def _evenly_by_class(labels: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` rows, ascending: a random one of each class in turn until they are reached."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[np.argsort(turn, kind="stable")[:most]])


def _class_labels(name: str, value: ArrayLike | Tensor, count: int, classes: int) -> NDArray[np.int64]:
    labels = _labels(name, value, count).numpy()
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return labels


def _images(name: str, value: ArrayLike | Tensor) -> NDArray[np.uint8]:
    images = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if images.dtype != np.uint8:
        raise TypeError(f"{name} must have dtype uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"{name} must have shape [N, H, W, 3], N at least 1, got {images.shape}")
    return images


def _ranked(name: str, value: ArrayLike | Tensor, kinds: str) -> NDArray[Any]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in kinds:
        raise TypeError(
            f"{name} must have {'dtype bool' if kinds == 'b' else 'an integer dtype'}, got {array.dtype}"
        )
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape [Q, k], k at least 1, got {array.shape}")
    return array


def _matching(match: ArrayLike | Tensor, queries: int, photos: int) -> NDArray[Any]:
    found = np.asarray(match.cpu() if isinstance(match, Tensor) else match)
    if found.shape != (queries,) or found.dtype.kind not in "iu":
        raise ValueError(f"match must be {queries} integers, one a query, got {found.dtype} {found.shape}")
    if found.min() < 0 or found.max() >= photos:
        raise ValueError(f"match must lie in 0..{photos - 1}, got {found.min()}..{found.max()}")
    return found


def _check_names(name: str, value: Sequence[str] | None, count: int) -> None:
    if value is not None and len(value) != count:
        raise ValueError(f"{name} must hold {count} names, one an image, got {len(value)}")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of whole words no wider than `width`; a word that is wider is shortened."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_shortened(word, font, width))
    return lines


def _shortened(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _shortened_to(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
