"""A run's identity, part by part: what is compared, when, and with what."""

import pytest

from lorax.recovery.identity import Identity

SAVED = {"settings": {"lora.r": 8}, "devices": 1, "tokenizer": "a", "held-out data": "b"}
MANIFEST = {"step": 3, "record": {"identity": SAVED}}


def test_a_run_that_begins_is_compared_with_nothing():
    identity = Identity()
    identity.add({"settings": {"lora.r": 4}, "held-out data": None})
    assert identity.parts == {"settings": {"lora.r": 4}} and identity.saved == {}


@pytest.mark.parametrize(
    "part, message",
    [
        ({"settings": {"lora.r": 4}}, "outputs/run cannot be resumed .*: lora.r was 8 and is 4"),
        ({"devices": 2}, "the devices changed: 1 then, 2 now"),
        ({"held-out data": None}, "the held-out data changed"),
        ({"adapter": "c"}, "the adapter changed"),  # of which the saved run had none
    ],
)
def test_a_part_is_compared_as_soon_as_it_is_known(part, message):
    identity = Identity(MANIFEST, "outputs/run")
    with pytest.raises(ValueError, match=message):
        identity.add(part)


def test_what_stayed_the_same_goes_on_and_what_is_missing_does_not():
    identity = Identity(MANIFEST, "outputs/run")
    identity.add({"settings": {"lora.r": 8}})
    identity.add({"devices": 1, "tokenizer": "a", "adapter": None})
    with pytest.raises(ValueError, match="the held-out data changed"):
        identity.go_on_from(MANIFEST["record"])
    identity.add({"held-out data": "b"})
    identity.go_on_from(MANIFEST["record"])
    assert identity.parts == SAVED


def test_an_older_checkpoint_that_says_something_else_is_compared_in_full():
    identity = Identity(MANIFEST, "outputs/run")
    identity.add(SAVED)
    with pytest.raises(ValueError, match="the tokenizer changed"):
        identity.go_on_from({"identity": SAVED | {"tokenizer": "other"}})


def test_a_checkpoint_that_is_read_last_is_compared_in_full():
    identity = Identity(where="outputs/run")
    identity.add(SAVED | {"devices": 2})
    with pytest.raises(ValueError, match="the devices changed"):
        identity.go_on_from(MANIFEST["record"])
