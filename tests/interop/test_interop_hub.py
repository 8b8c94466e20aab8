"""Checkpoints in the hub's cache, and why one cannot be had from the hub."""

import errno
import os
import re
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from lorax.data.chat.tokenizer import load_tokenizer
from lorax.interop.folder import resolve_checkpoint
from lorax.interop.load import load_hf_config, load_model
from lorax.system.files import CheckpointError
from tests.interop.shards import split_into_shards


def test_links_inside_the_hubs_cache_are_followed(folder, tmp_path):
    cache = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(index))
    load_model(snapshot)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("network"))
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_checkpoint(name)


def test_a_hub_id_fetches_the_shards_of_its_index_and_no_others(original, folder, monkeypatch):
    split_into_shards(folder)
    asked = []

    def snapshot(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_checkpoint("some/model", "main") == folder
    assert {(name, revision) for name, revision, _ in asked} == {("some/model", "main")}
    weights = [p for p in asked[-1][2] if p.endswith(".safetensors")]
    assert weights == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert not [p for p in asked[0][2] if p.endswith(".safetensors") or "*" in p]


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"HF_HUB_OFFLINE": "1"})
    with pytest.raises(
        CheckpointError, match=r"some/model: no such folder in .*, and not to be had from"
    ):
        load_hf_config("some/model")


def answered(status: int, code: str = ""):
    """Makes huggingface_hub itself raise what it raises for an answer of the hub."""

    def raise_it(name, **_):
        url = f"https://hub.example/api/models/{name}/revision/v1"
        head = {"X-Error-Code": code} if code else {}
        hf_raise_for_status(
            httpx2.Response(status, headers=head, request=httpx2.Request("GET", url))
        )

    return raise_it


def broken_off(name, **_):
    raise httpx2.ReadTimeout("timed out")


def unreachable(name, **_):
    try:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    except OSError as error:
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno 111]") from error


HUB = {
    "unknown name": (
        answered(404, "RepoNotFound"),
        "it shows you none of this name: correct the name",
    ),
    "not logged in": (
        answered(401),
        "it shows you none of this name: .*`hf auth login` if it is pri",
    ),
    "gated": (answered(403, "GatedRepo"), "its owner must agree: ask for access on its page"),
    "unknown revision": (answered(404, "RevisionNotFound"), "it has no revision 'v1' of it"),
    "out of order": (answered(503), r"it answers 503 \(Service Unavailable\): try again later"),
    "no network": (
        unreachable,
        r"it cannot be reached \(Connection refused\), and no copy was fet",
    ),
    "broken off": (broken_off, "timed out"),
}


@pytest.mark.parametrize("name", HUB)
def test_why_the_hub_does_not_give_a_model_is_told_in_words(monkeypatch, tmp_path, name):
    ask, reason = HUB[name]
    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama2").mkdir(parents=True)
    pattern = (
        rf"^models/llama: no such folder in {tmp_path} \(did you mean models/llama2\?\), and not "
    )
    with pytest.raises(
        CheckpointError, match=f"{pattern}to be had from the Hugging Face hub: {reason}"
    ) as raised:
        resolve_checkpoint("models/llama", "v1")
    assert not re.search(r"Errno|Error|Request ID|http|snapshot|\n", str(raised.value))


def test_a_tokenizer_that_the_hub_does_not_give_is_told_in_words():
    with pytest.raises(
        ValueError, match=r"^some/model: no such folder, and its tokenizer is not to"
    ):
        load_tokenizer("some/model")


def test_a_revision_of_a_folder_is_refused(original):
    with pytest.raises(CheckpointError, match="revision='main' is for hub ids only"):
        load_model(original, revision="main")
