"""Pieces of a row encoded by a given tokenizer."""

from lorax.data.preview import render_example


def pieces_with(encode_with, row, tokenizer, **settings):
    return render_example(encode_with([row], tokenizer, **settings), 0, tokenizer)
