"""What drafts for a tiny model: a model, an EAGLE head, layers that predict several tokens (MTP).

All are near to repeating what they are given, so that some drafts are taken.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import character_tokenizer, tiny

TENSORS = "model.safetensors"
# Attention heads of 32 dimensions, the smallest that vLLM's own attention on CPUs has.
WIDE = {"hidden_size": 128, "max_position_embeddings": 512}
NOISE = 0.05


def options_of(method: str, folder: Path) -> dict:
    """Options of the engine, with what drafts in FOLDER, or beside the model in its checkpoint."""
    speculation = {"method": method, "num_speculative_tokens": 3}
    if method == "mtp":
        _write_mtp(folder)
    else:
        speculation["model"] = str(folder / "drafts")
        (_write_model if method == "draft_model" else _write_eagle3)(folder / "drafts")
    return {"speculative_config": speculation}


def _write_model(folder: Path) -> None:
    """The one that is served is like it, but for its bases."""
    tiny("llama", **WIDE).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def _write_eagle3(folder: Path) -> None:
    model = tiny("llama", **WIDE)
    stored, size = model.state_dict(), WIDE["hidden_size"]
    tensors = {
        name.removeprefix("model."): tensor for name, tensor in stored.items() if name.startswith("model.layers.0.")
    }
    for name in ("q_proj", "k_proj", "v_proj"):  # of the embedding and what the model made of it
        place = f"layers.0.self_attn.{name}.weight"
        tensors[place] = torch.cat([tensors[place], tensors[place]], dim=1)
    tensors["layers.0.hidden_norm.weight"] = tensors["norm.weight"] = torch.ones(size)
    tensors["fc.weight"] = torch.cat([torch.zeros(size, 2 * size), torch.eye(size)], dim=1)  # the last layer's
    tensors["lm_head.weight"] = stored["lm_head.weight"]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.0.{name}.weight"] = NOISE * tensors[f"layers.0.{name}.weight"]
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
    of_head = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | of_head | layers))
    character_tokenizer().save_pretrained(folder)


def _write_mtp(folder: Path) -> None:
    """One more layer, which transformers leaves out."""
    tensors = load_file(folder / TENSORS)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    for name, tensor in list(tensors.items()):
        if name.startswith(last):
            small = NOISE if "o_proj" in name or "down_proj" in name else 1
            tensors[name.replace(last, new)] = small * tensor
    size = len(tensors["model.norm.weight"])
    tensors |= {f"{new}{name}.weight": torch.ones(size) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{new}eh_proj.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1)
    tensors[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / TENSORS, {"format": "pt"})
