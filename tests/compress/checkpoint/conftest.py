"""Tiny checkpoints as people have them: several files and an index, half precision, tied heads, biases."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file


def _tiny(kind: str, **changes):
    """A small model of a transformers class, weights drawn with a fixed seed."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    name = f"{kind}TextConfig" if kind in ("Gemma3", "Llama4") else f"{kind}Config"
    config = getattr(transformers, name)(**sizes | changes)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)._from_config(config).eval()


@pytest.fixture(scope="session")
def tiny():
    """Makes small models: tiny("Llama", vocab_size=64)."""
    return _tiny


@pytest.fixture(scope="module")
def several_parts():
    """Blocks this small would all share one part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perjoule.compress.checkpoint.run.UNIT_BYTES", 1)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A Llama folder in bfloat16, sharded, with a tokenizer beside it and a pickle that must not be copied."""
    folder = tmp_path_factory.mktemp("llama")
    _tiny("Llama").bfloat16().save_pretrained(folder, max_shard_size="10KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training.bin").write_bytes(b"pickle")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(1)
    ids = {n: torch.randint(64, (700,), generator=generator, dtype=torch.int16) for n in ("calibration", "heldout")}
    save_file(ids, file)
    return file
