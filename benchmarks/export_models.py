"""Exports the transformers of the benchmarks: real architectures and sizes, random weights from a fixed seed.

    python benchmarks/export_models.py FOLDER [NAME ...]

Needs `pip install torch==2.13.0 transformers onnxscript` (CPU is enough).  A model that the exporter itself refuses is
reported and left out.  Names end in the exporter (ts = TorchScript, dynamo) and st (static) or dyn (dynamic dims).
The deep ones, of many thin layers (deepbert_ts_dyn, deepgpt2_ts_dyn and deepvit_ts_st: 10 000 nodes each), are exported
where they are named.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Export:
    """A model, its sample inputs, and which dims of them are dynamic."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], Inputs]
    dynamic: Mapping[str, Mapping[int, str]]
    output: str


class Last(torch.nn.Module):  # type: ignore[misc]  # torch is untyped where it is not installed
    """Calls a transformers model by keyword and returns one tensor of its output."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], key: str) -> None:
        super().__init__()
        self.model, self.names, self.key = model.eval(), names, key

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        extra: dict[str, Any] = {} if "pixel_values" in self.names else {"use_cache": False}
        if "attention_mask" in self.names and self.key == "last_hidden_state":
            extra = {}
        found: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True)), **extra)[
            self.key
        ]
        return found


def tokens(*names: str, vocabulary: int = 1000, batch: int = 2, length: int = 16) -> Inputs:
    """Token ids, with a mask of ones where one is asked for."""
    return {
        name: torch.ones(batch, length, dtype=torch.long)
        if "mask" in name
        else torch.randint(0, vocabulary, (batch, length))
        for name in names
    }


def text(*names: str) -> dict[str, dict[int, str]]:
    """Batch and length as dynamic dims of each input."""
    return {name: {0: "batch", 1: "seq"} for name in names}


def pixels() -> Inputs:
    """One 224 x 224 image."""
    return {"pixel_values": torch.randn(1, 3, 224, 224)}


EXPORTS: dict[str, Export] = {
    "bert": Export(
        lambda: BertModel(BertConfig(), add_pooling_layer=False),
        lambda: tokens("input_ids", "attention_mask"),
        text("input_ids", "attention_mask"),
        "last_hidden_state",
    ),
    "gpt2": Export(
        lambda: GPT2LMHeadModel(GPT2Config()),
        # Without a mask the model looks for packed sequences by `diff`, which TorchScript cannot export.
        lambda: tokens("input_ids", "attention_mask"),
        text("input_ids", "attention_mask"),
        "logits",
    ),
    "vit": Export(
        lambda: ViTModel(ViTConfig(), add_pooling_layer=False), pixels, {}, "last_hidden_state"
    ),
    "swin": Export(
        lambda: SwinModel(SwinConfig(embed_dim=96, depths=[2, 2, 6, 2]), add_pooling_layer=False),
        pixels,
        {},
        "last_hidden_state",
    ),
    "t5": Export(
        lambda: T5ForConditionalGeneration(T5Config(d_model=512, num_layers=6, vocab_size=8000)),
        lambda: tokens("input_ids", "decoder_input_ids"),
        {"input_ids": {0: "batch", 1: "seq"}, "decoder_input_ids": {0: "batch", 1: "target"}},
        "logits",
    ),
    "llama": Export(
        lambda: LlamaForCausalLM(
            LlamaConfig(
                hidden_size=512,
                intermediate_size=1376,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=8000,
            )
        ),
        lambda: tokens("input_ids", "attention_mask"),
        text("input_ids", "attention_mask"),
        "logits",
    ),
    "deepbert": Export(
        lambda: BertModel(
            BertConfig(
                vocab_size=1000,
                hidden_size=64,
                num_hidden_layers=87,
                num_attention_heads=4,
                intermediate_size=128,
            ),
            add_pooling_layer=False,
        ),
        lambda: tokens("input_ids", "attention_mask"),
        text("input_ids", "attention_mask"),
        "last_hidden_state",
    ),
    "deepgpt2": Export(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=64, n_layer=45, n_head=4)),
        lambda: tokens("input_ids", "attention_mask"),
        text("input_ids", "attention_mask"),
        "logits",
    ),
    "deepvit": Export(
        lambda: ViTModel(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=150,
                num_attention_heads=4,
                intermediate_size=128,
            ),
            add_pooling_layer=False,
        ),
        pixels,
        {},
        "last_hidden_state",
    ),
}

# torch 2.13 decomposes their scaled_dot_product_attention to strides that the following view refuses.
EAGER = ("swin", "t5")

VARIANTS = {
    name: (base, exporter, dynamic)
    for base in EXPORTS
    for exporter in ("ts", "dynamo")
    for dynamic in (False, True)
    if (name := f"{base}_{exporter}_{'dyn' if dynamic else 'st'}")
    and not (dynamic and not EXPORTS[base].dynamic)
}


def export(name: str, folder: Path) -> Path:
    """Exports one variant; returns its path."""
    base, exporter, dynamic = VARIANTS[name]
    spec = EXPORTS[base]
    torch.manual_seed(0)
    inputs = spec.inputs()
    built = spec.build()
    if exporter == "dynamo" and base in EAGER:
        built.set_attn_implementation("eager")
    model = Last(built, tuple(inputs), spec.output)
    path = folder / f"{name}.onnx"
    common: dict[str, Any] = {
        "input_names": list(inputs),
        "output_names": [spec.output],
        "dynamo": exporter == "dynamo",
    }
    if exporter == "ts":
        axes = (
            {**spec.dynamic, spec.output: next(iter(spec.dynamic.values()), {})}
            if dynamic
            else None
        )
        torch.onnx.export(
            model, tuple(inputs.values()), str(path), opset_version=17, dynamic_axes=axes, **common
        )
    else:
        shapes = None
        if dynamic:
            dims = {
                d: torch.export.Dim(d, min=2, max=512)
                for dim in spec.dynamic.values()
                for d in dim.values()
            }
            shapes = (tuple({i: dims[d] for i, d in spec.dynamic[n].items()} for n in inputs),)
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(path),
            dynamic_shapes=shapes,
            external_data=False,
            **common,
        )
    return path


def main(argv: list[str]) -> None:
    """Exports the named variants, or all."""
    warnings.filterwarnings("ignore")
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in argv[1:] or [each for each in VARIANTS if not each.startswith("deep")]:
        if (folder / f"{name}.onnx").exists():
            continue
        started = time.time()
        try:
            path = export(name, folder)
        except Exception as fault:  # noqa: BLE001  exporters fail in any way they like: say so and go on
            print(
                f"{name}: the exporter refused: {type(fault).__name__}: {str(fault).splitlines()[0][:160]}"
            )
            continue
        print(
            f"{name}: {path.stat().st_size / 1e6:.0f} MB, {time.time() - started:.0f} s", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
