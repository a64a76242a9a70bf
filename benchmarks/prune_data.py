"""Samples and labelled tests of the networks whose curves `benchmarks.prune_curves` draws, made from the zoo.

A permutation (seed 0) parts what the zoo has: its beginning are the samples, which nobody labels, the rest the test.
Pictures are prepared as the zoo's own `score.py` prepares them; sentences are padded to 64 tokens, which needs
`tokenizers`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.labelled import scoring

Arrays: TypeAlias = "dict[str, npt.NDArray[Any]]"

TOKENS = 64
PAIRS = 300


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        title: what is written above its curves.
        samples: how many unlabelled samples there are; of MiniLM sentences, two of which make a pair.
        make: from the zoo and the name of the network, inputs by name and labels.
    """

    title: str
    samples: int
    make: Callable[[Path, str], tuple[Arrays, npt.NDArray[Any]]]


def parted(zoo: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """The files of samples and of the test, which are made in `folder` unless they lie there."""
    samples, test = folder / f"{name}_samples.npz", folder / f"{name}_test.npz"
    if samples.exists() and test.exists():
        return samples, test
    network = NETWORKS[name]
    inputs, labels = network.make(zoo, name)
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(inputs.values()))) // len(labels)  # of a pair two
    count = network.samples
    np.savez(samples, **{key: array[:count] for key, array in inputs.items()})  # type: ignore[arg-type]
    left = {key: array[count:] for key, array in inputs.items()}
    np.savez(test, y=labels[count // rows :], **left)  # type: ignore[arg-type]
    return samples, test


def _recipe(zoo: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((zoo / "models" / f"{name}.json").read_text("utf-8"))
    return found


def _order(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).permutation(count)


def _cifar(zoo: Path, name: str) -> tuple[Arrays, npt.NDArray[Any]]:
    """All JPEG pictures of CIFAR-10 that the zoo has."""
    recipe, score = _recipe(zoo, name), scoring(zoo)
    with np.load(zoo / "data" / "cifar10_jpeg.npz") as data:
        pictures, labels = data["x"], data["y"].astype(np.int64)
    order = _order(len(labels))
    planes = score.PRE[recipe["pre"]["norm"]](pictures).transpose(0, 3, 1, 2)
    ready = np.ascontiguousarray(planes).astype(np.float32)
    return {recipe["inputs"][0]["name"]: ready[order]}, labels[order]


def _imagenet(zoo: Path, name: str) -> tuple[Arrays, npt.NDArray[Any]]:
    """All pictures of ImageNet that the zoo has, channels last."""
    recipe, score = _recipe(zoo, name), scoring(zoo)
    rows = json.loads((zoo / recipe["data"]["labels"]).read_text("utf-8"))
    before, ready = recipe["pre"], []
    for row in rows:
        picture = score.img(str(zoo / recipe["data"]["dir"] / row["file"]))
        cut = score.center_crop(picture, before["size"], before["crop_frac"])
        ready.append(score.PRE[before["norm"]](cut).astype(np.float32))
    order = _order(len(rows))
    labels = np.array([row["label"] for row in rows])
    return {recipe["inputs"][0]["name"]: np.stack(ready)[order]}, labels[order]


def _sentences(zoo: Path, name: str) -> tuple[Arrays, npt.NDArray[Any]]:
    """Pairs of sentences of STS-B, one row a sentence, and how alike people find each pair."""
    tokenizers: Any = importlib.import_module("tokenizers")  # nothing else here needs it
    lines = (zoo / "data" / "stsb_dev.tsv").read_text("utf-8").rstrip("\n").split("\n")
    pairs = [line.split("\t") for line in lines]
    order = _order(len(pairs))[: NETWORKS[name].samples // 2 + PAIRS]
    file = zoo / "data" / "minilm_tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    coded = tokenizer.encode_batch([text for i in order for text in pairs[i][1:3]])
    tokens = np.array([each.ids for each in coded], np.int64)
    mask = np.array([each.attention_mask for each in coded], np.int64)
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
    return inputs, np.array([float(pairs[i][0]) for i in order])


NETWORKS = {
    "cifar10_resnet20": Network("ResNet-20, CIFAR-10", 256, _cifar),
    "cifar10_resnet56": Network("ResNet-56, CIFAR-10", 256, _cifar),
    "imagenet_mobilenetv1_025": Network("MobileNetV1 0.25, ImageNet", 100, _imagenet),
    "text_minilm_l6_ts14": Network("MiniLM L6, STS-B", 64, _sentences),
}
