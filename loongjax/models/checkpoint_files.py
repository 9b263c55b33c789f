"""Which files a Hugging Face checkpoint consists of, and which tensors they must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from loongjax.errors import CheckpointError
from loongjax.models.config import ModelConfig, read_json_object
from loongjax.models.safetensors_file import SafetensorsFile
from loongjax.models.sharding import abstract_params, param_paths, tensor_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@contextlib.contextmanager
def open_tensors(checkpoint_dir: Path, config: ModelConfig) -> Iterator[dict[str, SafetensorsFile]]:
    """The open file of every tensor that a checkpoint holds, checked against its configuration.

    Raises:
        CheckpointError: naming the file or tensor that is missing, left over, misshapen or cut short.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        for path in weight_files(checkpoint_dir):
            file = stack.enter_context(SafetensorsFile(path))
            files |= dict.fromkeys(file.tensors, file)
        check_tensors(checkpoint_dir, config, {name: file.tensors[name].shape for name, file in files.items()})
        for name in tensor_shapes(config):
            files[name].dtype(name)
        yield files


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or else all there are.

    Raises:
        CheckpointError: no such folder, no such files, or a file missing of those that the index names.
    """
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"{checkpoint_dir} is not a folder; give the path of a Hugging Face checkpoint's folder")
    index = checkpoint_dir / INDEX_FILE
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} must map tensor names to file names under 'weight_map'")
        files = [checkpoint_dir / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {index.name} names it")
        return files
    single = checkpoint_dir / SINGLE_FILE
    files = [single] if single.exists() else sorted(checkpoint_dir.glob("*.safetensors"))
    if files:
        return files
    if pickles := sorted(path.name for path in checkpoint_dir.glob("*.bin")):
        raise CheckpointError(
            f"{checkpoint_dir} holds only pickled weights ({', '.join(pickles)}), which are not read; convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{checkpoint_dir} holds no weights (*.safetensors)")


def check_tensors(checkpoint_dir: Path, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the files hold what the model needs, and nothing that it would not use."""
    expected = tensor_shapes(config)
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{checkpoint_dir} lacks {_some(missing)}")
    harmless = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        harmless.add("lm_head.weight")
    if unexpected := sorted(found.keys() - expected.keys() - harmless):
        raise CheckpointError(f"{checkpoint_dir} holds what its config.json has no place for: {_some(unexpected)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{checkpoint_dir}: tensor {name} has shape {list(found[name])}; "
                f"by config.json it must have {list(shape)}"
            )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration needs."""
    params = abstract_params(config, dtype=config.dtype)
    return {
        tensor_name(path): param.shape for path, param in zip(param_paths(params), jax.tree.leaves(params), strict=True)
    }


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{rest}"
