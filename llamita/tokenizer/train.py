"""Train a Llama 3 vocabulary of one's own: byte-level BPE (arXiv 1508.07909) on Llama 3's split."""

from collections.abc import Iterable

from llamita.tokenizer.llama3 import NUM_SPECIALS, PATTERN, Tokenizer, pieces


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` - 512 merges; the 256 single bytes and the 256 special tokens make up the rest.

    Depends on nothing but the counts of words, so equal texts in any order give the same tokenizer.
    ValueError if `vocab_size` is below 512 or if the texts hold too few different words for it.
    """
    import rustbpe  # type: ignore[import-untyped]

    smallest = 256 + NUM_SPECIALS
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and specials alone need {smallest}")
    trainer = rustbpe.Tokenizer()
    # rustbpe takes no surrogates: they become what Tokenizer.encode makes of them
    clean = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
    trainer.train_from_iterator(
        (piece for text in clean for piece in pieces(text)), vocab_size - NUM_SPECIALS, pattern=PATTERN
    )
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) + NUM_SPECIALS < vocab_size:
        raise ValueError(
            f"the text gives only {len(tokens) - 256} of the {vocab_size - smallest} merges that vocab_size "
            f"{vocab_size} needs; give more text, or a vocab_size of at most {len(tokens) + NUM_SPECIALS}"
        )
    return Tokenizer(tokens)
