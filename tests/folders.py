"""Model folders for tests, written as the stages write them: aside, then swapped in."""

from llamita.formats import hf
from llamita.formats.files import replacing
from llamita.formats.proof import seal
from llamita.formats.weights import KINDS, Weights, check_rows


def save(model, tokenizer, folder, dtype=None, write=hf.write):
    """Write `model` (a Llama) as a folder in the format of `write`, rounded to a torch dtype if one is given."""
    weights = Weights.of(model)
    check_rows(weights, tokenizer.vocab_size)
    with replacing(folder) as new:
        write(weights, tokenizer, new, KINDS[dtype or weights.dtype])
        seal(new, {})
